"""ASVD's search for ranks: how much the perplexity suffers from each layer alone, and which ranks are within a share.

Yuan et al., arXiv 2312.05821, section 3.3, "sensitivity-based truncation rank searching".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from alds_fast import AldsError
from alds_fast.blocks import Walk, find_chain
from alds_fast.measurement import private_runs

from ..language import perplexity
from .formulas import scaled
from .layers import rank_at, wide_weight

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NAME = "windows"
Sensitivities = dict[str, dict[float, float]]  # by layer, by share kept of it: perplexity


def sensitivities(
    model: nn.Module, windows: Tensor, layers: Mapping[str, nn.Linear], sizes: Mapping[str, Tensor],
    told: Callable[[str], None] = lambda name: None,
) -> Sensitivities:  # fmt: skip
    """The model's perplexity with one layer at one of RATIOS, all others dense.

    Args:
        model: a chain of blocks; those before the layer's are run once.
        windows: tokens (windows, length), four windows at most, which are run at once.
        layers: by name, in the order of the model.
        sizes: E|x_j| by layer.
        told: is called with the name of every layer that is finished.
    """
    if len(windows) > 4:
        raise AldsError(f"{len(windows)} windows are given, 1 to 4 are run at once; give fewer")
    found: Sensitivities = {}
    with private_runs(model) as run:
        chain = find_chain(model, run, [(1, windows)], NAME)
        walk = Walk(model, run, chain.blocks, chain.ends)
        for name, layer in layers.items():
            walk.advance(_blocks_before(chain.blocks, name), [(1, windows)], NAME)
            left, right = scaled(wide_weight(layer), sizes[name], min(layer.weight.shape))
            left, right = left.to(layer.weight), right.to(layer.weight)
            found[name] = {}
            for ratio in RATIOS:
                rank = rank_at(layer, ratio)
                with standing_in(layer, left[:, :rank], right[:rank]):
                    found[name][ratio] = perplexity(partial(walk.run, number=1, name=NAME), windows)
            if not all(map(math.isfinite, found[name].values())):
                raise AldsError(f"layer {name!r}: perplexities {found[name]} are not all finite; check the model")
            told(name)
    return found


def _blocks_before(blocks: tuple[str, ...], name: str) -> int:
    """How many of the blocks stand before the layer's own; none where it is in no block."""
    return next((i for i, block in enumerate(blocks) if name.startswith(f"{block}.")), 0)


@contextmanager
def standing_in(layer: nn.Linear, left: Tensor, right: Tensor) -> Iterator[None]:
    """The layer returns what it would with the weight left @ right."""

    def forward(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        product = args[0] @ right.T @ left.T
        return product if layer.bias is None else product + layer.bias

    handle = layer.register_forward_hook(forward)
    try:
        yield
    finally:
        handle.remove()


def ratios_within(found: Sensitivities, layers: Mapping[str, nn.Linear], share: float) -> dict[str, float]:
    """By layer the share kept of it, 1 for dense, so that all together keep that share at most.

    Cuts are taken in the order of their perplexities, the harmless first, until the share is met; a layer has the
    smallest share of the cuts taken. Raises AldsError if all cuts together are too few.
    """
    cuts = sorted((ppl, name, ratio) for name, by_ratio in found.items() for ratio, ppl in by_ratio.items())
    sizes = {name: layers[name].weight.numel() for name in found}
    kept, budget = dict.fromkeys(found, 1.0), share * sum(sizes.values())
    parameters = float(sum(sizes.values()))
    for _, name, ratio in cuts:
        if parameters <= budget:
            break
        new = min(kept[name], ratio)
        parameters -= _parameters(layers[name], kept[name]) - _parameters(layers[name], new)
        kept[name] = new
    if parameters > budget:
        raise AldsError(
            f"share={share:g} is less than all cuts leave, {parameters / sum(sizes.values()):.3f}; ask for that or more"
        )
    return kept


def _parameters(layer: nn.Linear, ratio: float) -> int:
    return layer.weight.numel() if ratio == 1 else rank_at(layer, ratio) * sum(layer.weight.shape)
