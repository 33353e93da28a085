"""Passes of networks over the batches of refit=: which layers take one together, from where on, and up to where.

In the end rows of the dense network's outputs stand beside those of what reaches the same layers in the compressed one.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from torch import Tensor, nn

from ...blocks import BlockChain, Kept, Room, find_chain, kinds_of
from ...criteria import Wanted, add_up_sums, by_side, fitting_mask, outputs, patches, rows_to_draw
from ...errors import ArgumentError
from ...layers import DecomposableLayer, Routed, is_linear, routed_rows
from ...measurement import Masks, Run, Samples, digest_of, first_input, masks_of, naming_batch, numbered_batches
from ...processes import World
from .cross_sums import CrossSums, LastRead, Rows, rows_read
from .stages import Network, Stage, hooked, run_until

_LOG = logging.getLogger(__name__)


def in_halves(data: Iterable[Any]) -> tuple[Any, Samples]:
    """The first batch, and which samples are which half; ArgumentError for no batches."""
    halves, first = Samples(1 / 2), None
    for batch in data:
        halves.aside(batch)
        first = batch if first is None else first
    if first is None:
        raise ArgumentError(
            "refit= has no batches, or had some once, and then none: each layer takes a pass; give a list of them"
        )
    return first, halves


def chain_of(model: nn.Module, run: Run, data: Iterable[Any], lists: Sequence[str] | None = None) -> BlockChain:
    """The model's blocks; none, as the log says, where it is no chain, or batches are others in every pass."""
    chain = find_chain(model, run, kinds_of(numbered_batches(data)), "refit=", lists)
    if chain.blocks and not isinstance(data, list | tuple):
        passes = [[digest_of(batch) for batch in data] for _ in range(2)]
        chain = chain if passes[0] == passes[1] else BlockChain(reason="a second pass gave other batches; pass a list")
    if not chain.blocks:
        return without_chain(chain.reason)
    _LOG.info("refit= goes on from %d blocks", len(chain.blocks))
    return chain


def without_chain(reason: str) -> BlockChain:
    """No blocks, as the log says."""
    _LOG.info("refit= goes on from 0 blocks (%s)", reason)
    return BlockChain(reason=reason)


class _Batch:
    """Hooks that sum up what one batch shows of a layer: first the dense network's outputs, then what reaches it."""

    def __init__(
        self, layer: DecomposableLayer, masks: Masks, halves: Tensor, seed: int, drawn: int, room: Room | None,
        rows: Tensor | None,
    ) -> None:  # fmt: skip
        """``drawn``: rows of batches before; ``room`` keeps the outputs, if that is for long; ``rows``: which ones."""
        self.layer, self.halves, self.seed, self.masks, self.room = layer, halves, seed, masks, room
        self.outputs: list[list[tuple[Tensor | Kept, Wanted]]] = []
        self.routed: list[Routed | None] = []
        self.drawn, self.rows = drawn, rows

    def dense(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        """After a call of the dense layer."""
        bias: Any = self.layer.module.bias  # of a layer that lost outputs or inputs its own
        routed = routed_rows()
        self.outputs.append([])
        self.routed.append(routed)
        for part in by_side(module, y, fitting_mask(self.layer, y, self.masks, routed), self.halves, routed):
            if part is not None:
                wanted = rows_to_draw(self.layer, self.drawn)
                samples, _ = outputs(module, *part, wanted, self.seed)
                samples = samples if self.rows is None else samples[..., self.rows.to(samples.device)]
                samples = samples.clone() if bias is None else samples - bias.view(samples.shape[1:])
                self.outputs[-1].append((samples if self.room is None else self.room.keep(samples), wanted))
                self.drawn += len(samples)

    def low_into(self, sums: CrossSums, last: LastRead, shared: bool) -> Any:
        """A hook before a call of the low-rank layer: the same rows as those of the dense layer's call are added.

        ``shared``: several layers read them.
        """

        def low(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, dense = first_input(args, kwargs), self.layer.module
            if not self.outputs:
                return
            routed, before = routed_rows(), self.routed.pop(0)
            sums.paired &= routed is before or (before is not None and before.same(routed))
            dense_outputs, keep = self.outputs.pop(0), fitting_mask(self.layer, x, self.masks, routed)

            def made() -> list[Rows | None]:
                parts = [part for part in by_side(dense, x, keep, self.halves, routed) if part is not None]
                found: list[Rows | None] = []
                for (_, wanted), part in zip(dense_outputs, parts, strict=True):
                    shift = next((rows.shift for rows in found if rows is not None), sums.shift)
                    found.append(rows_read(*patches(dense, *part, wanted, self.seed), shift, shared))
                return found

            sides = last.rows(x, self._key(x, keep, sums), made)
            for half, ((kept, _), rows) in enumerate(zip(dense_outputs, sides, strict=True)):
                y = kept if isinstance(kept, Tensor) else kept.tensor()
                sums.paired &= len(y) == (0 if rows is None else rows.x.shape[1])
                if sums.paired and rows is not None:
                    sums.add(y, rows, half)

        return low

    def _key(self, x: Tensor, keep: Tensor | None, sums: CrossSums) -> Any:
        """Layers that read one tensor, and for which it is the same, have the same rows; every convolution its own."""
        if not is_linear(self.layer.module):
            return object()
        version = None if x.is_inference() else x._version
        return version, None if keep is None else keep.tolist(), id(sums.shift), id(routed_rows())


class Pairs:
    """The sums of one stage after the other.

    Dense outputs of all layers of a block are taken in one pass, and kept until the stages of the block are done; where
    there are no blocks those of one stage at a time.
    """

    def __init__(
        self, model: Network, small: Network, layers: Mapping[str, DecomposableLayer], data: Iterable[Any],
        mask: str | None, halves: Samples, worth: float, room: Room, world: World, rows: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        self.model, self.small, self.layers, self.data = model, small, layers, data
        self.mask, self.halves, self.worth, self.room, self.world = mask, halves, worth, room, world
        self.rows = rows
        self._kept: dict[int, dict[str, _Batch]] = {}

    def of_all(self, stages: Sequence[Stage]) -> Iterator[dict[str, CrossSums]]:
        """The sums of every stage, by layer; the layers are to be fitted before the next one is asked for.

        Of several processes each has those of one layer of every round, see :func:`rounds`.
        """
        blocks = bool(self.model.walk.blocks)
        for _, group in itertools.groupby(enumerate(stages), lambda s: s[1].position if blocks else s[0]):
            yield from self._of_group([stage for _, stage in group])

    def _of_group(self, stages: Sequence[Stage]) -> Iterator[dict[str, CrossSums]]:
        position, dense = stages[0].position, self.model.walk
        for walk in (dense, self.small.walk):
            walk.advance(position, self._batches(), "refit=")
        self._kept, drawn = {}, dict[str, int]()
        if position < len(dense.blocks) and all(stage.last == position for stage in stages):
            self.room.begin()
            with closing(self._hooked(stages, drawn)) as batches:
                dense.advance(position + 1, batches, "refit=")
        elif len(stages) > 1:
            self.room.begin()
            for number, batch in self._batches():
                self._kept[number] = self._dense(number, batch, stages, drawn, self.room)
        for stage in stages:
            yield self._sums(stage, drawn)

    def _hooked(self, stages: Sequence[Stage], drawn: dict[str, int]) -> Generator[tuple[int, Any], None, None]:
        """The batches, each with hooks that keep outputs of the dense layers while it is run: for all of a block."""
        for number, batch in self._batches():
            kept = self._kept[number] = self._hooks(number, batch, stages, drawn, self.room)
            with hooked(self.model.model, {name: hook.dense for name, hook in kept.items()}, "forward_hook"):
                yield number, batch
            drawn.update({name: hook.drawn for name, hook in kept.items()})

    def _batches(self) -> Iterator[tuple[int, Any]]:
        """This process's."""
        return (batch for batch in numbered_batches(self.data) if self.world.takes(batch[0]))

    def _hooks(
        self, number: int, batch: Any, stages: Sequence[Stage], drawn: dict[str, int], room: Room | None
    ) -> dict[str, _Batch]:
        masks, halves = masks_of(self.model.model, batch, self.mask), self.halves.aside(batch)
        names = [name for stage in stages for name in stage.calls]
        return {n: _Batch(self.layers[n], masks, halves, number, drawn.get(n, 0), room, self.rows.get(n))
                for n in names}  # fmt: skip

    def _dense(
        self, number: int, batch: Any, stages: Sequence[Stage], drawn: dict[str, int], room: Room | None
    ) -> dict[str, _Batch]:
        hooks = self._hooks(number, batch, stages, drawn, room)
        dense, calls = {n: hook.dense for n, hook in hooks.items()}, sum(sum(stage.calls.values()) for stage in stages)
        with naming_batch(number, "refit="):
            run_until(self.model, batch, number, dense, calls, "forward_hook")
        drawn.update({name: hook.drawn for name, hook in hooks.items()})
        return hooks

    def _sums(self, stage: Stage, drawn: dict[str, int]) -> dict[str, CrossSums]:
        sums = {name: CrossSums(self.worth) for name in stage.calls}
        if not self.world.first:
            self._begin(sums)
        for number, batch in self._batches():
            seen = self._kept.get(number) or self._dense(number, batch, [stage], drawn, None)
            last = LastRead()
            low = {name: seen[name].low_into(sums[name], last, len(stage.calls) > 1) for name in stage.calls}
            with naming_batch(number, "refit="):
                run_until(self.small, batch, number, low, sum(stage.calls.values()), "forward_pre_hook")
            if number == 1:
                self._begin(sums)
        if self.world.size > 1:
            for together in rounds(sums, self.world.size):
                for rank, name in enumerate(together):
                    add_up_sums([sums[name]], self.world, rank)
        return sums

    def _begin(self, sums: Mapping[str, CrossSums]) -> None:
        """All processes measure from where the first has begun to."""
        if self.world.size > 1:
            shifts = {name: one.shift if one.shift is None else one.shift.cpu() for name, one in sums.items()}
            for name, shift in self.world.told_by(0, shifts if self.world.first else None).items():
                sums[name].shift = shift


def rounds(names: Iterable[str], size: int) -> list[list[str]]:
    """Layers that are fitted together, as many at a time as there are processes: the first by the first process."""
    every = list(names)
    return [every[i : i + size] for i in range(0, len(every), size)]
