"""Blocks of a compressed model trained, one after the other, to return what the dense model's blocks return.

Each block of the compressed model gets what the compressed blocks before it make of the data, and is to return what the
dense block returned in the dense model: the reconstruction of blocks of BRECQ (Li et al., ICLR 2021), here of low-rank
layers, their biases and the block's norms. A part of the batches is kept aside: a block is as it was after the pass
that did best there, and as it was before where none did better.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..blocks import BlockChain, Forward, LeftChain, Reached, Walk, find_chain, forwards
from ..checks import check_model, is_count, is_number
from ..errors import ArgumentError, ModelError
from ..layers import LowRankLayer, label
from ..measurement import USUAL, Masks, check_batches, masks_of, naming_batch, private_runs

SHARE_ASIDE = 1 / 8  # of the batches
_NAME = "refine()"
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

    def losses(self, number: int, batch: Any) -> list[tuple[Tensor, float]]:
        """Of each tensor that the block returns: squared distance from the dense block's, squared norm of that."""
        with naming_batch(number, _NAME):
            args, kwargs = self._call(number, batch)
            outputs, targets = _tensors(self.module.forward(*args, **kwargs)), _tensors(self.dense.output(number))
        masks, parts = masks_of(self.small.model, batch, self.mask), []
        for output, target in zip(outputs, targets, strict=True):
            keep = self._kept(masks, output)
            target = target[keep].float()
            energy = float(target.square().sum())
            if not math.isfinite(energy):
                raise ModelError(
                    f"block {self.name!r} of the dense model returns NaN or infinite values on batch {number}"
                )
            parts.append(((output[keep].float() - target).square().sum(), energy))
        if not parts:
            raise ModelError(f"block {self.name!r} returns no floating-point tensor that it could be refined by")
        return parts

    def _kept(self, masks: Masks, output: Tensor) -> Any:
        """Which places of an output count: all without a mask, or, with a warning, where none fits."""
        if not masks:
            return ...
        own, other = masks.of(self.name)
        for mask in (*own, *other):
            mask = mask.T if masks.tokens_first else mask
            if mask.shape == output.shape[:2]:
                return mask.to(output.device).bool()
        warnings.warn(
            f"the masks of data fit none of the outputs {tuple(output.shape)} of block {self.name!r}: padding counts "
            f"too; leave it out of the batches, or say so by mask=None",
            stacklevel=6,
        )
        return ...

    def _call(self, number: int, batch: Any) -> BlockCall:
        """What the compressed model calls the block with."""
        calls: list[BlockCall] = []

        def make(own: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                calls.append((args, kwargs))
                raise Reached

            return forward

        with torch.no_grad(), forwards(self.small.model, {self.name: make}), suppress(Reached):
            self.small.run(batch, number, f"batch {number} of {_NAME}")
        if not calls:
            raise LeftChain(f"batch {number} does not come to block {self.name!r}")
        return calls[0]

    def error(self, batches: Numbered) -> float:
        """Relative error over batches, the root of the mean of the squares over the tensors that the block returns."""
        with torch.no_grad():
            parts = [[(float(part), energy) for part, energy in self.losses(*batch)] for batch in batches]
        sums = [[sum(column) for column in zip(*tensor, strict=True)] for tensor in zip(*parts, strict=True)]
        return math.sqrt(sum(lost / energy for lost, energy in sums if energy > 0) / len(sums))

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
                    sum(lost / max(energy, 1e-30) for lost, energy in self.losses(*used[i])).backward()  # type: ignore[union-attr]
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


def _tensors(output: Any) -> list[Tensor]:
    """What a block returns that can be compared place by place."""
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 1]


def trained_parameters(model: nn.Module, block: str) -> list[nn.Parameter]:
    """Those of a block's low-rank layers, and biases and scales of norms, unless they are used elsewhere too."""
    module = model.get_submodule(block)
    low = [p for m in module.modules() if isinstance(m, LowRankLayer) for p in m.parameters()]
    named = model.named_parameters(remove_duplicate=False)
    shared = {id(p) for name, p in named if not name.startswith(f"{block}.")}
    every = dict.fromkeys([*low, *(p for p in module.parameters() if p.dim() == 1)])
    return [p for p in every if id(p) not in shared]


@torch.inference_mode(False)  # or nothing could be trained
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
        chain = find_chain(model, run_dense, numbered, _NAME)
        if not chain.blocks:
            raise ModelError(f"refine() needs a chain of blocks: {chain.reason}; retrain(distill=) trains any model")
        dense, low = (Walk(net, run, chain.blocks, chain.ends) for net, run in ((model, run_dense), (small, run_small)))
        try:
            _refine_all(dense, low, chain, used, aside, epochs, lr, mask, reports, progress)
        except LeftChain as e:
            raise ModelError(f"refine() needs a chain of blocks: {e} in the compressed model") from e
    return small, reports


def _refine_all(
    dense: Walk, small: Walk, chain: BlockChain, used: Numbered, aside: Numbered, epochs: int, lr: float,
    mask: str | None, reports: list[Refined], progress: Callable[[str, int, int], None],
) -> None:  # fmt: skip
    for position, name in enumerate(chain.blocks):
        block = _Block(dense, small, name, mask)
        dense.advance(position + 1, [*used, *aside], _NAME)
        low = any(isinstance(m, LowRankLayer) for m in block.module.modules())
        parameters = trained_parameters(small.model, name) if low else []
        if parameters:
            with _asking(small.model, parameters):
                reports.append(block.train(parameters, used, aside, epochs, lr))
        small.advance(position + 1, [*used, *aside], _NAME)
        progress("blocks refined", position + 1, len(chain.blocks))


@contextmanager
def _asking(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """These parameters and no others ask for a gradient; the flags are put back at the end."""
    chosen, before = set(map(id, parameters)), [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in chosen)
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


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
