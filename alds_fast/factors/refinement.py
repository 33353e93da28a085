"""Blocks of a compressed model trained, one after the other, to return what the dense model's blocks return.

Each block of the compressed model gets what the compressed blocks before it make of the data, and is to return what the
dense block returned in the dense model: the reconstruction of blocks of BRECQ (Li et al., ICLR 2021), here of low-rank
layers, their biases and the block's norms. A part of the batches is kept aside: a block is as it was after the pass
that did best there, and as it was before where none did better.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..blocks import BlockChain, Forward, Reached, Walk, find_chain, forwards
from ..checks import check_model, is_count, is_number
from ..errors import ArgumentError, ModelError
from ..layers import LowRankLayer, label
from ..measurement import USUAL, check_batches, masks_of, naming_batch, private_runs

SHARE_ASIDE = 1 / 8  # of the batches
_NAME = "a batch of refine()"
BlockCall = tuple[tuple[Any, ...], dict[str, Any]]
Numbered = list[tuple[int, Any]]


class Refined(NamedTuple):
    """A block, and the relative error of its output on the batches kept aside, before and after."""

    block: str
    before: float
    after: float


class _Block:
    """A block of the compressed model on its way to what the dense model's returns."""

    def __init__(self, dense: Walk, small: Walk, name: str, mask: str | None) -> None:
        self.dense, self.small, self.name, self.mask = dense, small, name, mask
        self.module = small.model.get_submodule(name)

    def loss(self, number: int, batch: Any) -> tuple[Tensor, float]:
        """Squared distance from the dense block's output on a batch, and the squared norm of that."""
        args, kwargs = self._call(number, batch)
        output, target = (
            _first(y, self.name) for y in (self.module.forward(*args, **kwargs), self.dense.output(number))
        )
        own, other = masks_of(self.small.model, batch, self.mask).of(self.name)
        rows = [m for m in (*own, *other) if m.shape == output.shape[:2]]
        keep = rows[0].to(output.device).bool() if rows else slice(None)
        target = target[keep].float()
        return (output[keep].float() - target).square().sum(), float(target.square().sum())

    def _call(self, number: int, batch: Any) -> BlockCall:
        """What the compressed model calls the block with."""
        calls: list[BlockCall] = []

        def make(own: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                calls.append((args, kwargs))
                raise Reached

            return forward

        with torch.no_grad(), forwards(self.small.model, {self.name: make}), suppress(Reached):
            self.small.run(batch, number, _NAME)
        return calls[0]

    def error(self, batches: Numbered) -> float:
        """Relative error over batches."""
        with torch.no_grad():
            parts = [self.loss(number, batch) for number, batch in batches]
        scale = sum(energy for _, energy in parts)
        return math.sqrt(sum(float(part) for part, _ in parts) / scale) if scale > 0 else 0.0

    def train(
        self, parameters: Sequence[nn.Parameter], used: Numbered, aside: Numbered, epochs: int, lr: float
    ) -> Refined:
        """Passes over the batches, in a new order each; the best state is kept."""
        before = best = self.error(aside)
        kept = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(used))
        generator = torch.Generator().manual_seed(0)
        for _ in range(epochs):
            for i in torch.randperm(len(used), generator=generator, device="cpu").tolist():
                with torch.enable_grad():
                    loss, energy = self.loss(*used[i])
                    (loss / max(energy, 1e-30)).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            error = self.error(aside)
            if error < best:  # not where it is NaN
                best, kept = error, [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
        return Refined(self.name, before, best)


def _first(output: Any, block: str) -> Tensor:
    found = next((t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()), None)
    if found is None:
        raise ModelError(f"block {block!r} returns no floating-point tensor that it could be refined by")
    return found


def trained_parameters(block: nn.Module) -> list[nn.Parameter]:
    """Those of low-rank layers, and all of one dimension: biases and scales of norms."""
    low = [p for m in block.modules() if isinstance(m, LowRankLayer) for p in m.parameters()]
    return list(dict.fromkeys([*low, *(p for p in block.parameters() if p.dim() == 1)]))


def refine(
    small: nn.Module,
    model: nn.Module,
    data: Iterable[Any],
    *,
    epochs: int = 3,
    lr: float = 2e-4,
    mask: str | None = USUAL,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[nn.Module, list[Refined]]:
    """A copy of a compressed model whose blocks were trained to return what the dense model's return.

    Args:
        small: the compressed model, of any plan or method, in float32 or float64; it is not changed.
        model: the dense one that it was made of.
        data: a list of batches as for :func:`alds_fast.analyze`, without labels, two at least; an eighth is kept aside,
            one at least. Each batch is one step, so that they should be small.
        epochs: passes over the others, for each block.
        lr: learning rate of AdamW at the beginning; it goes to 0 along a cosine.
        mask: as for analyze: what is padding does not count.
        progress: told (what, done, total) after each block.

    Returns:
        The model, and for each block with low-rank layers the relative errors of its output on the batches kept aside.

    What the blocks return is kept for the next one, beyond 1 GB in temporary files. What is trained are the low-rank
    layers, and biases and norms of their blocks. Layers outside of blocks are left as they are. To train all layers at
    once, for the dense model's outputs or labels, see ``retrain(distill=)``.

    Raises:
        ArgumentError: an argument is out of range; half types.
        ModelError: the model is no chain of blocks (:mod:`alds_fast.blocks`), says why, or has raised an exception.
    """
    _check(small, model, data, epochs, lr)
    numbered: Numbered = list(enumerate(data, 1))
    if len(numbered) < 2:
        raise ArgumentError(f"data has {len(numbered)} batches; give two at least, of which one is kept aside")
    count = max(1, int(len(numbered) * SHARE_ASIDE))
    used, aside = numbered[:-count], numbered[-count:]
    small = copy.deepcopy(small)
    reports: list[Refined] = []
    with ExitStack() as stack:
        changing = [p for p in small.parameters() if p.dim() == 1]
        run_dense = stack.enter_context(private_runs(model))
        run_small = stack.enter_context(private_runs(small, changing))
        with naming_batch(1, "refine()"):
            chain = find_chain(model, run_dense, numbered[0][1], "batch 1 of refine()")
        if not chain.blocks:
            raise ModelError(f"refine() needs a chain of blocks: {chain.reason}; retrain(distill=) trains any model")
        dense, low = (Walk(net, run, chain.blocks, chain.ends) for net, run in ((model, run_dense), (small, run_small)))
        _refine_all(dense, low, chain, used, aside, epochs, lr, mask, reports, progress)
    return small, reports


def _refine_all(
    dense: Walk, small: Walk, chain: BlockChain, used: Numbered, aside: Numbered, epochs: int, lr: float,
    mask: str | None, reports: list[Refined], progress: Callable[[str, int, int], None],
) -> None:  # fmt: skip
    for position, name in enumerate(chain.blocks):
        block = _Block(dense, small, name, mask)
        dense.advance(position + 1, [*used, *aside], _NAME)
        if any(isinstance(m, LowRankLayer) for m in block.module.modules()):
            parameters = trained_parameters(block.module)
            asked = [p.requires_grad for p in small.model.parameters()]
            try:
                chosen = set(map(id, parameters))
                for p in small.model.parameters():
                    p.requires_grad_(id(p) in chosen)
                reports.append(block.train(parameters, used, aside, epochs, lr))
            finally:
                for p, flag in zip(small.model.parameters(), asked, strict=True):
                    p.requires_grad_(flag)
        small.advance(position + 1, [*used, *aside], _NAME)
        progress("blocks refined", position + 1, len(chain.blocks))


def _check(small: nn.Module, model: nn.Module, data: Any, epochs: object, lr: object) -> None:
    for net in (small, model):
        check_model(net)
    check_batches(data, "data")
    if not is_count(epochs):
        raise ArgumentError(f"epochs={epochs!r} is not an integer >= 1")
    if not is_number(lr) or not 0 < lr < math.inf:
        raise ArgumentError(f"lr={lr!r} is outside (0, inf); 1e-4 to 5e-4 is usual")
    low = {name: m for name, m in small.named_modules() if isinstance(m, LowRankLayer)}
    if not low:
        raise ModelError("the model has no low-rank layers: there is nothing to refine")
    half = next((n for n, m in low.items() if m.encoder.dtype.itemsize < 4), None)
    if half is not None:
        raise ArgumentError(
            f"layer {label(half)} is {low[half].encoder.dtype}, in which steps of {lr} get lost: refine the model in "
            f"float32 (both of them .float()), and make the result half afterwards"
        )
    missing = [name for name in low if not isinstance(dict(model.named_modules()).get(name), nn.Module)]
    if missing or any(isinstance(m, LowRankLayer) for m in model.modules()):
        raise ModelError("refine(small, model, data): the second model is not the dense one that the first is made of")
