"""Blocks of a compressed model trained, one after the other, to return what the dense model's blocks return.

Each block of the compressed model gets what the compressed blocks before it make of the data, and is to return what the
dense block returned in the dense model: the reconstruction of blocks of BRECQ (Li et al., ICLR 2021), here of low-rank
layers, their biases and the block's norms. A part of the batches is kept aside: a block is as it was after the pass
that did best there, and as it was before where none did better.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..blocks import BlockChain, Forward, LeftChain, Reached, Room, Walk, check_lists, find_chain, forwards, kinds_of
from ..checks import is_count
from ..errors import ArgumentError, ModelError
from ..layers import annotate, opened_for
from ..measurement import USUAL, masks_of, naming_batch, private_runs, without_labels
from ..progress import Progress, ProgressOption, tell_nobody, telling
from .training import (
    Numbered,
    asking,
    check_pair,
    check_schedule,
    is_changed,
    kept_places,
    set_aside,
    train,
    trained_parameters,
    trained_reports,
)

PASSES = 3  # over the batches, for each block, unless users say how many
RATE = 1e-3  # of AdamW at the beginning, by each parameter's size: docs/data.md has what others did
LEAST_ENERGY = 0.1  # of the median of a batch's rows
_NAME = "refine()"
BlockCall = tuple[tuple[Any, ...], dict[str, Any]]


def passes_of(refine: object) -> int:
    """How many passes ``refine=`` asks for: True for the usual number, False for none; ArgumentError for no number."""
    if isinstance(refine, bool):
        return PASSES if refine else 0
    if not is_count(refine):
        raise ArgumentError(f"refine={refine!r} is neither True nor False nor a number of passes over the data, >= 1")
    return operator.index(refine)


class Refined(NamedTuple):
    """A block, and its output's relative error, root mean square over tokens kept aside, before and after."""

    block: str
    before: float
    after: float


class _Block:
    """A block of the compressed model on its way to what the dense model's returns."""

    def __init__(self, dense: Walk, small: Walk, name: str, mask: str | None) -> None:
        self.dense, self.small, self.name, self.mask = dense, small, name, mask
        self.module = small.model.get_submodule(name)

    def losses(self, number: int, batch: Any) -> list[tuple[Tensor, float]]:
        """Of each tensor that the block returns: the sum of its rows' squared relative errors, and how many there are.

        (Rows of which the dense block makes next to nothing count by a tenth of the median's energy.)
        """
        with naming_batch(number, _NAME):
            args, kwargs = self._call(number, batch)
            outputs, targets = _tensors(self.module.forward(*args, **kwargs)), _tensors(self.dense.output(number))
        masks, parts = masks_of(self.small.model, batch, self.mask), []
        for output, target in zip(outputs, targets, strict=True):
            keep = kept_places(masks, self.name, output, f"block {self.name!r}")
            target, output = _rows(target[keep].float()), _rows(output[keep].float())
            energy = target.square().sum(-1)
            if not bool(energy.isfinite().all()):
                raise ModelError(
                    f"block {self.name!r} of the dense model returns NaN or infinite values on batch {number}"
                )
            energy = energy.clamp_min(max(LEAST_ENERGY * float(energy.median()), 1e-30)) if len(energy) else energy
            parts.append((((output - target).square().sum(-1) / energy).sum(), float(len(energy))))
        if not parts:
            raise ModelError(f"block {self.name!r} returns no floating-point tensor that it could be refined by")
        return parts

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


def _rows(x: Tensor) -> Tensor:
    """(rows, n): tokens along the last dimension, or whole samples of what has more than tokens (pictures)."""
    return x.flatten(0, -2) if x.dim() <= 3 else x.flatten(1)


def _tensors(output: Any) -> list[Tensor]:
    """What a block returns that can be compared place by place."""
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 1]


@torch.inference_mode(False)  # or nothing could be trained
def refine(
    small: nn.Module,
    model: nn.Module,
    data: Iterable[Any],
    *,
    epochs: int = PASSES,
    lr: float = RATE,
    mask: str | None = USUAL,
    progress: ProgressOption = None,
    blocks: str | Sequence[str] | None = None,
) -> tuple[nn.Module, list[Refined]]:
    """A copy of a compressed model whose blocks were trained to return what the dense model's return.

    Args:
        small: the compressed model, of any plan or method, in float32 or float64; it is not changed.
        model: the dense one that it was made of.
        data: a list of batches as for :func:`alds_fast.analyze`, without labels, two at least; an eighth is kept aside,
            one at least. Each batch is one step, so that they should be small.
        epochs: passes over the others, for each block.
        lr: learning rate of AdamW at the beginning, as a share of each parameter's root mean square; it goes to 0
            along a cosine.
        mask: as for analyze: what is padding does not count.
        progress: as for :func:`alds_fast.analyze`, after each block.
        blocks: names of the lists that hold the blocks, "model.layers" for one, where these are not found; several as a
            sequence or with commas.

    Returns:
        The model, and for each block with low-rank layers the relative errors of its output on the batches kept aside.

    What the blocks return is kept for the next one, beyond 1 GB in temporary files. What is trained are the low-rank
    layers, and biases and norms of their blocks. Layers outside of blocks are left as they are. See
    :func:`alds_fast.distill` for all layers at once.

    Raises:
        ArgumentError: an argument is out of range; half types.
        ModelError: the model is no chain of blocks (:mod:`alds_fast.blocks`), says why, or has raised an exception.
    """
    check_pair(small, model, "refine")
    check_schedule(data, "data", epochs, lr)
    data, lists = without_labels(model, data), check_lists(blocks)
    small = copy.deepcopy(small)
    model = opened_for(model, [name for name, m in small.named_modules() if is_changed(m)])
    with telling(progress) as tell:
        done = refine_blocks(small, model, data, epochs=epochs, lr=lr, mask=mask, progress=tell, lists=lists)
    better = [block.block for block in done if block.after < block.before]
    reports = getattr(small, "alds_factors", {})
    annotate(small, factors=reports | trained_reports(reports, small, model, "refined", better))
    return small, done


def check_chain(model: nn.Module, batch: Any, lists: Sequence[str] | None = None) -> None:
    """ModelError unless a model is a chain of blocks, as far as one batch tells."""
    with private_runs(model) as run:
        _needed_chain(find_chain(model, run, [(1, batch)], _NAME, lists))


def _needed_chain(chain: BlockChain) -> None:
    if not chain.blocks:
        raise ModelError(f"refine() needs a chain of blocks: {chain.reason}; alds_fast.distill trains any model")


class Steps:
    """Told of every block before its ``parameters`` are trained, and when it is done; here nothing comes of it.

    ``known`` are blocks that were trained before.
    """

    known: Container[str] = ()

    def begin(self, parameters: Sequence[nn.Parameter]) -> None:
        """These are about to be written to."""

    def end(self, block: Refined) -> None:
        """They have their values."""


def refine_blocks(
    small: nn.Module, model: nn.Module, data: Iterable[Any], *, epochs: int = PASSES, lr: float = RATE,
    mask: str | None = USUAL, progress: Progress = tell_nobody, chain: BlockChain | None = None,
    lists: Sequence[str] | None = None, steps: Steps | None = None, room: Callable[[], Room] = Room,
) -> list[Refined]:  # fmt: skip
    """:func:`refine` of a compressed model in place, of arguments that were checked.

    ``chain``: the blocks, if they have been found, ``lists`` where users say that they are;
    ``room`` makes what keeps their outputs.
    """
    used, aside = set_aside(data, "data")
    reports: list[Refined] = []
    with ExitStack() as stack:
        changing = [p for p in small.parameters() if p.dim() == 1]
        run_dense = stack.enter_context(private_runs(model))
        run_small = stack.enter_context(private_runs(small, changing))
        chain = find_chain(model, run_dense, kinds_of([*used, *aside]), _NAME, lists) if chain is None else chain
        _needed_chain(chain)
        dense, low = (
            Walk(net, run, chain.blocks, chain.ends, room=room())
            for net, run in ((model, run_dense), (small, run_small))
        )
        try:
            _refine_all(dense, low, chain, used, aside, epochs, lr, mask, reports, progress, steps or Steps())
        except LeftChain as e:
            raise ModelError(f"refine() needs a chain of blocks: {e} in the compressed model") from e
    return reports


def _refine_all(
    dense: Walk, small: Walk, chain: BlockChain, used: Numbered, aside: Numbered, epochs: int, lr: float,
    mask: str | None, reports: list[Refined], progress: Progress, steps: Steps,
) -> None:  # fmt: skip
    for position, name in enumerate(chain.blocks):
        block = _Block(dense, small, name, mask)
        dense.advance(position + 1, [*used, *aside], _NAME)
        low = any(map(is_changed, block.module.modules()))
        parameters = trained_parameters(small.model, name) if low and name not in steps.known else []
        if parameters:
            steps.begin(parameters)
            with asking(small.model, parameters):
                errors = train(block.losses, parameters, used, aside, epochs, lr)
            reports.append(Refined(name, *map(math.sqrt, errors)))
            steps.end(reports[-1])
        small.advance(position + 1, [*used, *aside], _NAME)
        progress("blocks refined", position + 1, len(chain.blocks))
