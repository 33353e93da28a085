"""Sums of several processes, each of which has seen its own batches, made into those of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...errors import ArgumentError
from ...layers import label
from ...processes import World
from .held_rows import HeldRows
from .hooks import Collector
from .sums import ProductSums, Sums

Beginnings = Mapping[str, Mapping[str, Tensor | None]]  # by kind of sums and layer


def _by_kind(collector: Collector) -> dict[str, dict[str, Any]]:
    return {"inputs": collector.sums, "gradients": collector.gradient_sums}


def _begun(by_layer: Mapping[str, Any]) -> dict[str, ProductSums]:
    return {name: sums for name, sums in by_layer.items() if isinstance(sums, ProductSums) and sums.begun}


def beginnings(collector: Collector) -> Beginnings:
    """Of the sums that the first batch has begun, what is taken out of all rows, on the CPU."""
    on_cpu: dict[int, Tensor] = {}  # q, k and v have one in common

    def shift(sums: ProductSums) -> Tensor | None:
        return None if sums.shift is None else on_cpu.setdefault(id(sums.shift), sums.shift.cpu())

    by_kind = _by_kind(collector)
    return {kind: {name: shift(sums) for name, sums in _begun(by_kind[kind]).items()} for kind in by_kind}


def begin_as(collector: Collector, known: Beginnings) -> None:
    """Sums that others have begun go on here."""
    for kind, by_layer in _by_kind(collector).items():
        for name, shift in known[kind].items():
            by_layer[name].begun, by_layer[name].shift = True, shift


def add_up(collector: Collector, known: Beginnings, world: World) -> None:
    """The first process gets what all have seen; ``known`` is what its first batch has begun."""
    for kind, by_layer in _by_kind(collector).items():
        if others := _begun(by_layer).keys() - known[kind].keys():
            raise ArgumentError(
                f"batch 1 of data= does not reach layer {label(min(others))}, which others do: with {world.size} "
                f"processes all begin with what is seen of it; put another batch first, or leave out torchrun"
            )
        add_up_sums(list(by_layer.values()), world)
    told = world.told_first((collector.tokens, collector.masked, collector.energy, collector.held))
    if told:
        tokens, masked, energies, held = zip(*told, strict=True)
        collector.tokens, collector.masked, collector.energy = any(tokens), any(masked), sum(energies)
        collector.held = {name: HeldRows.of_all([rows[name] for rows in held]) for name in collector.held}


def add_up_sums(sums: Sequence[Sums], world: World, rank: int = 0) -> None:
    """The process of that rank gets what all have seen, each sum in the place of its own."""
    parts = [one.parts() for one in sums]
    told = world.tell([numbers for numbers, _ in parts])
    tensors = iter(world.add_up([row for _, rows in parts for row in rows], rank))
    for one, (_, rows), *numbers in zip(sums, parts, *told, strict=True):
        one.take([sum(values) for values in zip(*numbers, strict=True)], [next(tensors) for _ in rows])
