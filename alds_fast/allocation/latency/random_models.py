"""Low-rank layers and models of random factors, to be timed: what the factors are does not change the time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ...layers import LowRankLayer, low_rank_like, oriented_weight, replace_layers
from ...linalg import Decomposition
from ...measurement import (
    STEADY,
    call_model,
    copy_batch,
    inference,
    keeping_state,
    paired_ratios,
    quartile_spread,
    steady_ms,
)

REPEATS = 3  # times that rounds are repeated at most while they are far apart


class EndToEnd(NamedTuple):
    """A compressed model's latency over the dense one's, in the round that is in the middle by that ratio.

    ``spread`` is the distance of the quartiles of all rounds over that ratio, the milliseconds are of that round.
    """

    ratio: float
    spread: float
    dense_ms: float
    compressed_ms: float


def random_low_rank(module: nn.Module, decomposition: Decomposition) -> LowRankLayer:
    """A low-rank layer in the place of ``module``, to be timed: random factors whose product has the weight's norm.

    (So activations keep their scale through a deep model, and no denormal numbers distort the time.)
    """
    weight: Any = module.weight
    layer = low_rank_like(module, decomposition).to(weight.dtype).to_empty(device=weight.device)
    scale = (float(oriented_weight(module).float().square().mean()) / decomposition.rank) ** 0.25
    layer.reset_order()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factor in (layer.encoder, layer.decoder):
            factor.copy_(torch.randn(factor.shape, generator=generator, device="cpu") * scale)
        if layer.bias is not None:
            layer.bias.zero_()
    return layer


def random_model(model: nn.Module, replaced: Mapping[str, Decomposition]) -> nn.Module:
    """A copy with low-rank layers of random factors in the place of these, by name. ModelError if it cannot be made."""
    modules = dict(model.named_modules())
    return replace_layers(model, {name: random_low_rank(modules[name], d) for name, d in replaced.items()})


def end_to_end(
    model: nn.Module, replaced: Mapping[str, Decomposition], example_inputs: Any, device: torch.device
) -> EndToEnd:
    """A compressed model beside the dense one, taking turns; of more rounds where rounds are far apart.

    ModelError if the model cannot be copied.
    """
    small = random_model(model, replaced)
    with inference(model), inference(small), keeping_state(model):
        sides = {"dense": partial(call_model, model, copy_batch(example_inputs))}
        sides["compressed"] = partial(call_model, small, copy_batch(example_inputs))
        times = steady_ms(sides, device, "dense", repeats=REPEATS, steady=STEADY)
    ratios = paired_ratios(times, "compressed", "dense")
    rounds = sorted(zip(ratios, times["dense"], times["compressed"], strict=True))
    ratio, dense_ms, compressed_ms = rounds[len(rounds) // 2]
    return EndToEnd(ratio, quartile_spread(ratios), dense_ms, compressed_ms)
