"""The rows of a plan: one layer each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..allocation import MAX_LATENCY_GROUPS, Candidates
from ..criteria import Basis
from ..errors import LayerNotFoundError
from ..factors import Choice
from ..layers import DecomposableLayer, Layer
from ..linalg import Decomposition, Pivots, WeightShape
from ..measurement import STEADY
from ..text import meant
from .options import Pin


@dataclass(frozen=True)
class LayerPlan:
    """One row of a plan.

    ``scheme``, ``groups`` and ``rank`` are None for a layer that stays dense, and ``reason`` then says why. ``error``
    is the relative error of the plan's criterion (0 for a dense layer, NaN for a row edited by hand). Parameters are
    the layer's own, bias included. ``held_out`` is the error on samples that were kept aside, None without any;
    ``criterion`` what the layer was judged by, None for that of the plan, and ``remark`` says why, or what else is
    special about it, None for nothing. ``pivots``: "output" or "input" for factors without an identity, "" for plain
    ones (:mod:`alds_fast.linalg.pivots`). ``stored``: parameters of the weight as the model has it, None where these
    are those of a dense one; where hidden units were removed, all that the layer had but for what is left of its bias.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    conv_groups: int
    scheme: int | None
    groups: int | None
    rank: int | None
    error: float
    params_before: int
    params_after: int
    reason: str | None
    held_out: float | None = None
    criterion: str | None = None
    remark: str | None = None
    pivots: Pivots = ""
    stored: int | None = None

    @property
    def choice(self) -> Choice | None:
        """What to put in the layer's place, None if it stays dense."""
        if self.scheme is None or self.groups is None or self.rank is None:
            return None
        shape = WeightShape(self.shape[0], self.shape[1] * self.conv_groups, self.shape[2:], self.conv_groups)
        return Choice(self.name, shape, Decomposition(self.scheme, self.groups, self.rank, self.pivots))


class RowsByName:
    """Rows that are looped over, and found by the names of their layers."""

    layers: Sequence[LayerPlan]

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __getitem__(self, name: str) -> LayerPlan:
        """The row of one layer; LayerNotFoundError for another name."""
        by_name = {row.name: row for row in self.layers}
        if name not in by_name:
            words = f"{meant(str(name), by_name)}; [row.name for row in plan] has the names"
            raise LayerNotFoundError(f"plan[{name!r}]: no layer has that name{words}")
        return by_name[name]


@dataclass(frozen=True)
class Latency:
    """What a budget on latency achieved, measured end to end with dense and compressed taking turns.

    ``asked`` and ``measured`` are shares of the dense model's latency. The rounds are ordered by this share, and the
    milliseconds are those of the one in the middle, whose share is ``measured``; ``spread`` is how far the quartiles
    are apart, over that share, None in plans of older versions. ``device`` names the hardware, ``refinements`` counts
    how often the timings were corrected.
    """

    asked: float
    measured: float
    dense_ms: float
    compressed_ms: float
    device: str
    refinements: int
    spread: float | None = None

    TOLERANCE: ClassVar[float] = 0.1

    @property
    def distance(self) -> float:
        """Relative distance of the measured share from the one asked for."""
        return abs(self.measured / self.asked - 1.0)

    @property
    def saves_half(self) -> bool:
        """Whether at least half of the time that was to be saved is saved: what is less is as good as nothing."""
        return self.asked >= 1.0 or self.measured <= (1.0 + self.asked) / 2

    @property
    def steady(self) -> bool:
        """Whether the rounds were near enough to one another to refuse a plan for what they say."""
        return self.spread is None or self.spread <= STEADY

    @property
    def is_met(self) -> bool:
        """Within the tolerance, and with half of the saving at least."""
        return self.distance <= self.TOLERANCE and self.saves_half

    def __str__(self) -> str:
        beyond = ", faster than asked" if self.measured < self.asked else f", NOT within {self.TOLERANCE:.0%} of it"
        far = "" if self.is_met else beyond
        if not self.saves_half:
            far = ", NOT half of the saving"
        times = f"{self.dense_ms:.3g} -> {self.compressed_ms:.3g} ms"
        asked = f"latency {self.asked:.2f} asked, {self.measured:.2f} measured{far}, {times} on {self.device}"
        spread = "" if self.spread is None else f"; quartiles of its rounds {self.spread:.0%} apart"
        return f"{asked}{spread}; up to {MAX_LATENCY_GROUPS} channel slices were tried"


@dataclass(frozen=True)
class Quality:
    """What a search for the smallest plan of enough quality found.

    ``asked`` and ``measured`` are what the plan's model was to have and has, ``dense`` what the dense model has;
    ``steps`` are all that was measured, in order: (share of the parameters kept, quality).
    """

    asked: float
    measured: float
    dense: float
    steps: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        steps = ", ".join(f"{quality:.6g} at {keep:.2%}" for keep, quality in self.steps)
        return f"quality {self.asked:g} asked, {self.measured:.6g} measured, dense {self.dense:.6g}; tried {steps}"


def plan_rows(
    layers: Sequence[Layer], chosen: Mapping[str, tuple[Candidates, int, str]], align: int, pins: Mapping[str, Pin],
    basis: Basis, weights: Mapping[str, float],
) -> tuple[LayerPlan, ...]:  # fmt: skip
    """The rows of all layers, see :func:`plan_row`, by name of those that are ``chosen`` for."""
    special = [(chosen.get(x.name), align, pins.get(x.name, Pin()), basis, weights.get(x.name, 1.0)) for x in layers]
    return tuple(plan_row(layer, *of) for layer, of in zip(layers, special, strict=True))


def plan_row(
    layer: Layer, pick: tuple[Candidates, int, str] | None, align: int, pin: Pin, basis: Basis, weight: float
) -> LayerPlan:
    """The row of a layer: left out without a ``pick`` (candidates, the one chosen, why it stays dense if it does).

    ``weight`` is the factor of its errors, ``basis`` what they are measured by.
    """
    row = _chosen_row(layer, pick, align, pin)
    choice = row.choice
    if choice is None or not isinstance(layer, DecomposableLayer):
        return row
    fold, rank = choice.decomposition.fold, choice.decomposition.rank
    criterion = basis.criterion_of(layer.name)
    if criterion != basis.criterion:
        row = replace(row, criterion=criterion)
    counted = None if weight == 1.0 else f"its error is stated times {weight:g}, as importance= says"
    remarks = [text for text in (basis.remark(layer.name), pin.remark if pin.said else None, counted) if text]
    row = replace(row, remark="; ".join(remarks) or None)
    if not basis.has_kept_aside(layer):
        return row
    stated, held_out = (float(basis.fold_errors(layer, *fold, held_out=aside)[rank]) for aside in (False, True))
    return replace(row, error=weight * stated, held_out=held_out)


def _chosen_row(layer: Layer, pick: tuple[Candidates, int, str] | None, align: int, pin: Pin) -> LayerPlan:
    groups = layer.shape.conv_groups if layer.shape else 1
    row: dict[str, Any] = {"name": layer.name, "kind": layer.kind, "shape": layer.weight, "conv_groups": groups}
    row |= {"scheme": None, "groups": None, "rank": None, "error": 0.0}
    row |= {"params_before": layer.params, "params_after": layer.params, "reason": layer.reason}
    if pick is None or not isinstance(layer, DecomposableLayer):
        return LayerPlan(**row)
    row["stored"] = None if layer.stored == layer.shape.numel else layer.stored
    choices, candidate, reason = pick
    chosen = choices.decomposition(candidate)
    if chosen is None:
        if pin.dense:
            return LayerPlan(**{**row, "reason": pin.remark})
        limits = [f"multiples of {align}"] if align > 1 else []
        limits += [f"{pin.min_rank} at least"] if pin.min_rank > 1 else []
        ranks = f" with ranks that are {' and '.join(limits)}" if limits else ""
        pinned = f"; {pin.remark}" if pin.said else ""
        none = f"no factorisation{ranks} is smaller{pinned}"
        reason = reason.replace("stay dense", "stay as it is") if layer.fold else reason
        return LayerPlan(**{**row, "reason": reason if choices.curves else none})
    row |= {**chosen.to_dict(), "error": float(choices.errors[candidate])}
    row["params_after"] -= layer.stored - chosen.params(layer.shape)
    return LayerPlan(**row)


def bytes_held(costs: Mapping[str, tuple[int, int]]) -> tuple[int, int] | None:
    """Bytes before and after: of weights, and where a run was measured of its activations; None if they are not known.

    >>> bytes_held({"memory": (2_000_000, 500_000), "activations": (300_000, 400_000)})
    (2300000, 900000)
    """
    if "memory" not in costs:
        return None
    weights, peaks = costs["memory"], costs.get("activations", (0, 0))
    return weights[0] + peaks[0], weights[1] + peaks[1]
