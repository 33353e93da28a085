"""Gradients taken back through a network block after block, so that one block's graph is held at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..measurement import naming_batch
from .states import Kept, Room
from .walk import Forward, LeftChain, Reached, Walk, forwards

Gradients = list[Tensor | None]  # of the floating-point tensors that a block returns, in their order


class BackwardWalk:
    """Gradients at the ends of blocks, for batches by their numbers, of a walk that keeps what every block returns.

    It begins behind the last block; every :meth:`step` takes the walk one block back.
    """

    def __init__(self, walk: Walk, room: Room | None = None) -> None:
        """The walk must have come to its end."""
        self.walk, self._room = walk, room or Room()
        self._at: dict[int, dict[str, list[Kept | None]]] = {}  # by batch, by block

    def step(self, batches: Iterable[tuple[int, Any]], name: str, begin: Callable[[Any, int, Any], None]) -> None:
        """Run every batch from the walk's position to the next end and back, with hooks of gradients at work.

        ``begin(output, number, batch)`` takes the gradients of the model's output, at the first step.
        """
        self._room.begin()
        for number, batch in batches:
            leaves: dict[str, list[Tensor]] = {}
            with naming_batch(number, name), torch.enable_grad():
                if self.walk.position == len(self.walk.blocks):
                    begin(self.walk.run(batch, number, name, _asking(leaves)), number, batch)
                else:
                    self._through(batch, number, name, leaves)
            self._keep(number, leaves)
        self.walk.position = max(0, self.walk.position - 1)

    def _through(self, batch: Any, number: int, name: str, leaves: dict[str, list[Tensor]]) -> None:
        block, returned = self.walk.blocks[self.walk.position], list[Tensor]()

        def make(own: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                returned.extend(_floating(own(*args, **kwargs)))
                raise Reached

            return forward

        with forwards(self.walk.model, {block: make}), suppress(Reached):
            self.walk.run(batch, number, name, _asking(leaves))
            raise LeftChain(f"batch {number} does not come to block {block!r}")
        gradients = self._at.get(number, {}).pop(block, [None] * len(returned))
        known = [(y, g.tensor()) for y, g in zip(returned, gradients, strict=True) if g is not None and y.requires_grad]
        if known:
            torch.autograd.backward([y for y, _ in known], [g for _, g in known])

    def _keep(self, number: int, leaves: dict[str, list[Tensor]]) -> None:
        at = self._at.setdefault(number, {})
        for block, tensors in leaves.items():
            before = at.get(block, [None] * len(tensors))  # some of an end, which several blocks read
            at[block] = [self._both(leaf.grad, old) for leaf, old in zip(tensors, before, strict=True)]

    def _both(self, new: Tensor | None, old: Kept | None) -> Kept | None:
        if new is None:
            return old
        return self._room.keep(new if old is None else new + old.tensor())


def _floating(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]


def _asking(leaves: dict[str, list[Tensor]]) -> Callable[[str, Any], Any]:
    """What gives the rest of a model a block's output that asks for gradients, and may be written to."""

    def seen(block: str, output: Any) -> Any:
        leaves[block] = [t.requires_grad_() for t in _floating(output)]
        return tree_map(lambda t: t.clone() if isinstance(t, Tensor) and t.is_floating_point() else t, output)

    return seen
