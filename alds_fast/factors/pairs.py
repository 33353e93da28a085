"""Rows of the dense network's outputs beside those of what reaches the same layers in the compressed one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..blocks import Kept, Room
from ..criteria import Wanted, by_side, fitting_mask, outputs, patches, rows_to_draw
from ..layers import DecomposableLayer, Routed, routed_rows
from ..measurement import Masks, Samples, first_input, masks_of, naming_batch, numbered_batches
from .passes import Network, Stage, run_until
from .ridge import CrossSums


class _Batch:
    """Hooks that sum up what one batch shows of a layer: first the dense network's outputs, then what reaches it."""

    def __init__(
        self, layer: DecomposableLayer, masks: Masks, halves: Tensor, seed: int, drawn: int, room: Room | None
    ) -> None:
        """``drawn``: rows of the batches before; ``room`` keeps the outputs, if that is for long."""
        self.layer, self.halves, self.seed, self.masks, self.room = layer, halves, seed, masks, room
        self.outputs: list[list[tuple[Tensor | Kept, Wanted]]] = []
        self.routed: list[Routed | None] = []
        self.drawn = drawn

    def dense(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        """After a call of the dense layer."""
        bias: Any = module.bias
        routed = routed_rows()
        self.outputs.append([])
        self.routed.append(routed)
        for part in by_side(module, y, fitting_mask(self.layer, y, self.masks, routed), self.halves, routed):
            if part is not None:
                wanted = rows_to_draw(self.layer, self.drawn)
                samples, _ = outputs(module, *part, wanted, self.seed)
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
        mask: str | None, halves: Samples, worth: float, room: Room,
    ) -> None:  # fmt: skip
        self.model, self.small, self.layers, self.data = model, small, layers, data
        self.mask, self.halves, self.worth, self.room = mask, halves, worth, room
        self._kept: dict[int, dict[str, _Batch]] = {}

    def of_all(self, stages: Sequence[Stage]) -> Iterator[dict[str, CrossSums]]:
        """The sums of every stage, by layer; the layers are to be fitted before the next one is asked for."""
        blocks = bool(self.model.walk.blocks)
        for _, group in itertools.groupby(enumerate(stages), lambda s: s[1].position if blocks else s[0]):
            yield from self._of_group([stage for _, stage in group])

    def _of_group(self, stages: Sequence[Stage]) -> Iterator[dict[str, CrossSums]]:
        for net in (self.model, self.small):
            net.walk.advance(stages[0].position, numbered_batches(self.data), "refit=")
        self._kept, drawn = {}, dict[str, int]()
        if len(stages) > 1:
            self.room.begin()
            for number, batch in numbered_batches(self.data):
                self._kept[number] = self._dense(number, batch, stages, drawn, self.room)
        for stage in stages:
            yield self._sums(stage, drawn)

    def _dense(
        self, number: int, batch: Any, stages: Sequence[Stage], drawn: dict[str, int], room: Room | None
    ) -> dict[str, _Batch]:
        masks, halves = masks_of(self.model.model, batch, self.mask), self.halves.aside(batch)
        calls = {name: count for stage in stages for name, count in stage.calls.items()}
        hooks = {n: _Batch(self.layers[n], masks, halves, number, drawn.get(n, 0), room) for n in calls}
        dense = {name: hook.dense for name, hook in hooks.items()}
        with naming_batch(number, "refit="):
            run_until(self.model, batch, number, dense, sum(calls.values()), "forward_hook")
        drawn.update({name: hook.drawn for name, hook in hooks.items()})
        return hooks

    def _sums(self, stage: Stage, drawn: dict[str, int]) -> dict[str, CrossSums]:
        sums = {name: CrossSums(self.worth) for name in stage.calls}
        for number, batch in numbered_batches(self.data):
            seen = self._kept.get(number) or self._dense(number, batch, [stage], drawn, None)
            low = {name: seen[name].low_into(sums[name]) for name in stage.calls}
            with naming_batch(number, "refit="):
                run_until(self.small, batch, number, low, sum(stage.calls.values()), "forward_pre_hook")
        return sums
