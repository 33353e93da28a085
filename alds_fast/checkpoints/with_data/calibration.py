"""What the layers of a mapped model see of the batches of a job, in its journal."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...blocks import BlockChain, LeftChain, Room, find_chain, kinds_of
from ...criteria import GRADIENTS, INPUTS, collect_by_blocks, collect_moments
from ...errors import ModelError
from ...layers import DecomposableLayer
from ...measurement import Sensitivity, private_runs
from ..streaming.streamed_model import Work
from .mapped import let_weights_go, runs, runs_on_device
from .needs import IN_MEMORY
from .stored_moments import StoredMoments

HELD_OUT = 1 / 8


def room(work: Work) -> Room:
    """What keeps blocks' outputs."""
    return Room(IN_MEMORY, work.journal.folder)


def tried_chain(work: Work, model: nn.Module, batches: Sequence[Any]) -> BlockChain:
    """The model's blocks, tried on batches of every kind."""
    with runs(work, model), private_runs(model) as run:
        return find_chain(model, run, kinds_of(enumerate(batches, 1)), "data=", work.settings.blocks)


def check_one_process(work: Work, chain: BlockChain) -> None:
    """ModelError for several, who share the batches of a block, where there is no chain of blocks."""
    if work.world.size > 1 and not chain.blocks:
        raise ModelError(
            f"data= with {work.world.size} processes needs a chain of blocks: {chain.reason}; leave out torchrun"
        )


def collect(
    work: Work, model: nn.Module, chain: BlockChain, batches: Sequence[Any], layers: Sequence[DecomposableLayer],
    sensitivity: Sensitivity, store: StoredMoments,
) -> None:  # fmt: skip
    """All moments, in the journal; with a warning all at once in memory where the model is no chain of blocks."""
    reason = chain.reason

    def done(part: int, parts: int) -> None:
        let_weights_go(work)
        work.progress("moments", part, parts)

    if chain.blocks:
        try:
            with runs_on_device(work, model, blocks=chain.blocks):
                collect_by_blocks(
                    model, batches, layers, chain, store, sensitivity=sensitivity, held_out=HELD_OUT,
                    room=lambda: room(work), done=done, world=work.world,
                )  # fmt: skip
            if work.world.first:
                store.finish(len(chain.blocks) + 1)
            return
        except LeftChain as e:
            reason = str(e)
            check_one_process(work, BlockChain(reason=reason))
    warnings.warn(
        f"{type(model).__name__} is no chain of blocks ({reason}): the moments of all layers are collected together, "
        f"in memory",
        stacklevel=2,
    )
    with torch.inference_mode(False), runs_on_device(work, model, blocks=()):
        moments = collect_moments(
            model, batches, layers, sensitivity=sensitivity, held_out=HELD_OUT,
            done=lambda count: work.progress("moments", count, len(batches)),
        )  # fmt: skip
    store.keep(INPUTS, 0, moments)
    if sensitivity:
        store.keep(GRADIENTS, 0, {n: (m.gradient, m.gradient_noise) for n, m in moments.items()})
    store.finish(1)
