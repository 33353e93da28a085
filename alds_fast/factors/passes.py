"""Passes of networks over the batches of refit=: which layers take one together, from where on, and up to where.

In the end rows of the dense network's outputs stand beside those of what reaches the same layers in the compressed one.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..blocks import BlockChain, Kept, Reached, Room, Walk, find_chain
from ..criteria import Wanted, add_up_sums, by_side, fitting_mask, outputs, patches, rows_to_draw
from ..errors import ArgumentError
from ..layers import DecomposableLayer, Routed, routed_rows
from ..measurement import Masks, Run, Samples, digest_of, first_input, masks_of, naming_batch, numbered_batches
from ..processes import World
from .ridge import CrossSums

_LOG = logging.getLogger(__name__)


class Network:
    """A network, how it is run, and how from the end of a block on."""

    def __init__(self, model: nn.Module, run: Run, chain: BlockChain, room: Room | None = None) -> None:
        self.model, self.walk = model, Walk(model, run, chain.blocks, chain.ends, room=room)


class Stage(NamedTuple):
    """Layers that are fitted together, with the number of their calls, and the blocks that are run before them."""

    calls: dict[str, int]
    position: int


def run_until(
    net: Network, batch: Any, number: int, hooks: Mapping[str, Callable[..., None]], calls: int, kind: str
) -> None:
    """Run the model with hooks on layers, by name, until ``calls`` calls of them have been made."""
    remaining = calls

    def counting(hook: Callable[..., None]) -> Callable[..., None]:
        def count(*args: Any) -> None:
            nonlocal remaining
            hook(*args)
            remaining -= 1
            if remaining == 0:
                raise Reached

        return count

    with ExitStack() as stack:
        for name, hook in hooks.items():
            register = getattr(net.model.get_submodule(name), f"register_{kind}")
            stack.callback(register(counting(hook), with_kwargs=True).remove)
        with suppress(Reached):
            net.walk.run(batch, number, "a batch of refit=")


def find_stages(net: Network, batch: Any, names: Sequence[str], blocks: Sequence[str]) -> list[Stage]:
    """Layers in the order of their first calls, those that read one tensor together."""
    order: list[tuple[str, Tensor, int, int]] = []  # with the version: an input changed in place is another one
    done: list[nn.Module] = []

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_input(args, kwargs)
            order.append((name, x, 0 if x.is_inference() else x._version, len(done)))

        return note

    with ExitStack() as stack:
        for block in blocks:
            end = net.model.get_submodule(block).register_forward_hook(lambda module, args, y: done.append(module))
            stack.callback(end.remove)
        run_until(net, batch, 1, {name: hook(name) for name in names}, 0, "forward_pre_hook")
    calls = dict.fromkeys((name for name, *_ in order), 0)
    stages: list[Stage] = []
    before: tuple[Tensor | None, int] = None, 0
    for name, x, version, position in order:
        if not calls[name] and x is before[0] and version == before[1]:
            stages[-1].calls[name] = 0
        elif not calls[name]:
            stages.append(Stage({name: 0}, position))
        calls[name], before = calls[name] + 1, (x, version)
    return [Stage({name: calls[name] for name in stage.calls}, stage.position) for stage in stages]


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
    chain = find_chain(model, run, numbered_batches(data), "refit=", lists)
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

    def low_into(self, sums: CrossSums) -> Any:
        """A hook before a call of the low-rank layer: the same rows as those of the dense layer's call are added."""

        def low(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, dense = first_input(args, kwargs), self.layer.module
            if not self.outputs:
                return
            routed, before = routed_rows(), self.routed.pop(0)
            sums.paired &= routed is before or (before is not None and before.same(routed))
            keep = fitting_mask(self.layer, x, self.masks, routed)
            sides = [part for part in by_side(dense, x, keep, self.halves, routed) if part is not None]
            for half, ((kept, wanted), part) in enumerate(zip(self.outputs.pop(0), sides, strict=True)):
                y = kept if isinstance(kept, Tensor) else kept.tensor()
                samples, rows = patches(dense, *part, wanted, self.seed)
                sums.paired &= len(y) == len(samples)
                if sums.paired:
                    sums.add(y, samples, rows, half)

        return low


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
        for net in (self.model, self.small):
            net.walk.advance(stages[0].position, self._batches(), "refit=")
        self._kept, drawn = {}, dict[str, int]()
        if len(stages) > 1:
            self.room.begin()
            for number, batch in self._batches():
                self._kept[number] = self._dense(number, batch, stages, drawn, self.room)
        for stage in stages:
            yield self._sums(stage, drawn)

    def _batches(self) -> Iterator[tuple[int, Any]]:
        """This process's."""
        return (batch for batch in numbered_batches(self.data) if self.world.takes(batch[0]))

    def _dense(
        self, number: int, batch: Any, stages: Sequence[Stage], drawn: dict[str, int], room: Room | None
    ) -> dict[str, _Batch]:
        masks, halves = masks_of(self.model.model, batch, self.mask), self.halves.aside(batch)
        calls = {name: count for stage in stages for name, count in stage.calls.items()}
        hooks = {n: _Batch(self.layers[n], masks, halves, number, drawn.get(n, 0), room, self.rows.get(n))
                 for n in calls}  # fmt: skip
        dense = {name: hook.dense for name, hook in hooks.items()}
        with naming_batch(number, "refit="):
            run_until(self.model, batch, number, dense, sum(calls.values()), "forward_hook")
        drawn.update({name: hook.drawn for name, hook in hooks.items()})
        return hooks

    def _sums(self, stage: Stage, drawn: dict[str, int]) -> dict[str, CrossSums]:
        sums = {name: CrossSums(self.worth) for name in stage.calls}
        if not self.world.first:
            self._begin(sums)
        for number, batch in self._batches():
            seen = self._kept.get(number) or self._dense(number, batch, [stage], drawn, None)
            low = {name: seen[name].low_into(sums[name]) for name in stage.calls}
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
