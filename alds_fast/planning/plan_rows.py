"""The rows of a plan: one layer each, and how they are read back from JSON, every field checked."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..allocation import MAX_LATENCY_GROUPS, Candidates
from ..criteria import CRITERIA
from ..errors import ArgumentError, PlanError
from ..factors import Choice
from ..layers import DecomposableLayer, Layer
from ..linalg import Decomposition, Pivots, WeightShape
from ..text import shape_text

APART = 1.5  # times the stated errors, above which those on samples kept aside are warned of


@dataclass(frozen=True)
class LayerPlan:
    """One row of a plan.

    ``scheme``, ``groups`` and ``rank`` are None for a layer that stays dense, and ``reason`` then says why. ``error``
    is the relative error of the plan's criterion (0 for a dense layer, NaN for a row edited by hand). Parameters are
    the layer's own, bias included. ``held_out`` is the error on samples that were kept aside, None without any;
    ``criterion`` what the layer was judged by, None for that of the plan, and ``remark`` says why, or what else is
    special about it, None for nothing. ``pivots``: "output" or "input" for factors without an identity, "" for plain
    ones (:mod:`alds_fast.linalg.pivots`).
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

    @property
    def choice(self) -> Choice | None:
        """What to put in the layer's place, None if it stays dense."""
        if self.scheme is None or self.groups is None or self.rank is None:
            return None
        shape = WeightShape(self.shape[0], self.shape[1] * self.conv_groups, self.shape[2:], self.conv_groups)
        return Choice(self.name, shape, Decomposition(self.scheme, self.groups, self.rank, self.pivots))


_LATER = {"held_out", "criterion", "remark", "pivots"}  # fields that older plans do not have
_FIELDS = {field.name for field in dataclasses.fields(LayerPlan)} - _LATER | {"error_is_of"}


@dataclass(frozen=True)
class Latency:
    """What a budget on latency achieved, measured end to end with dense and compressed taking turns.

    ``asked`` and ``measured`` are shares of the dense model's latency; the milliseconds are medians of that
    measurement; ``device`` names the hardware and ``refinements`` counts how often the timings were corrected.
    """

    asked: float
    measured: float
    dense_ms: float
    compressed_ms: float
    device: str
    refinements: int

    TOLERANCE: ClassVar[float] = 0.1

    @property
    def distance(self) -> float:
        """Relative distance of the measured share from the one asked for."""
        return abs(self.measured / self.asked - 1.0)

    def __str__(self) -> str:
        far = f", NOT within {self.TOLERANCE:.0%} of it" if self.distance > self.TOLERANCE else ""
        times = f"{self.dense_ms:.3g} -> {self.compressed_ms:.3g} ms"
        asked = f"latency {self.asked:.2f} asked, {self.measured:.2f} measured{far}, {times} on {self.device}"
        return f"{asked}; up to {MAX_LATENCY_GROUPS} channel slices were tried"


def read_latency(fields: Any) -> Latency | None:
    """A plan's latency from its JSON fields, None for null."""
    if fields is None:
        return None
    if not isinstance(fields, dict) or set(fields) != {field.name for field in dataclasses.fields(Latency)}:
        raise PlanError(f"not a plan: latency={fields!r} does not have the fields of a measured latency")
    shares = {n: read_number(fields, "latency", n) for n in ("asked", "measured", "dense_ms", "compressed_ms")}
    if not all(0 < value < math.inf for value in shares.values()):
        raise PlanError(f"not a plan: latency={fields!r} has shares or times that are not above 0")
    device, refinements = (
        read_field(fields, "latency", "device", str),
        read_field(fields, "latency", "refinements", int),
    )
    return Latency(**shares, device=device, refinements=refinements)


def read_field(fields: dict[str, Any], where: str, name: str, kind: type) -> Any:
    """A field of that type; integers must not be negative."""
    value = fields[name]
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
        raise PlanError(f"{where}: {name}={value!r} is not {'a text' if kind is str else 'an integer >= 0'}")
    return value


def read_number(fields: dict[str, Any], where: str, name: str) -> float:
    """A number >= 0; null is NaN, "inf" infinity."""
    value = fields[name]
    if value is None or value == "inf":
        return math.nan if value is None else math.inf
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise PlanError(f"{where}: {name}={value!r} is not a number >= 0, null or 'inf'")
    return float(value)


def read_row(fields: dict[str, Any]) -> LayerPlan:
    """A row from its JSON fields; where the choice was edited, the parameters are counted anew and the error is NaN."""
    if not isinstance(fields, dict) or set(fields) - _LATER != _FIELDS:
        raise PlanError(f"not a plan: a layer has the fields {sorted(fields)}, expected {sorted(_FIELDS)}")
    where = f"layer {read_field(fields, 'a layer', 'name', str)!r}"
    shape, triple = fields["shape"], [fields[name] for name in ("scheme", "groups", "rank")]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise PlanError(f"{where}: shape={shape!r} is not a list of integers >= 0")
    if any(v is None for v in triple) != all(v is None for v in triple):
        raise PlanError(f"{where}: scheme, groups and rank must be all null or all integers, got {triple}")
    for name in ("reason", "remark"):
        if fields.get(name) is not None:
            read_field(fields, where, name, str)
    if fields.get("pivots", "") not in ("", "output", "input"):
        raise PlanError(f"{where}: pivots={fields['pivots']!r} is neither 'output' nor 'input', nor ''")
    counts = {n: read_field(fields, where, n, int) for n in ("conv_groups", "params_before", "params_after")}
    held_out = None if fields.get("held_out") is None else read_number(fields, where, "held_out")
    if fields.get("criterion") not in (None, *CRITERIA):
        raise PlanError(f"{where}: criterion={fields['criterion']!r} is not one of {', '.join(CRITERIA)}")
    known: dict[str, Any] = {
        "held_out": held_out,
        "kind": read_field(fields, where, "kind", str),
        "error": read_number(fields, where, "error"),
        **counts,
    }
    known |= {n: v for n, v in fields.items() if n != "error_is_of" and n not in known}
    row = LayerPlan(**{**known, "shape": tuple(shape)})
    if row.rank is not None:
        _check_choice(row, where)
    if choice_fields(fields) == fields["error_is_of"]:
        return row
    choice = row.choice
    after = row.params_before - (choice.shape.numel - choice.decomposition.params(choice.shape) if choice else 0)
    reason = None if choice else "kept dense by hand"
    changed = {"params_after": after, "error": math.nan if choice else 0.0, "reason": reason, "held_out": None}
    return LayerPlan(**{**vars(row), **changed})


def _check_choice(row: LayerPlan, where: str) -> None:
    if any(type(v) is not int for v in (row.scheme, row.groups, row.rank)):
        raise PlanError(f"{where}: scheme, groups and rank must be integers")
    if len(row.shape) < 2 or 0 in row.shape or row.conv_groups < 1 or row.shape[0] % row.conv_groups:
        raise PlanError(f"{where}: shape={row.shape} with conv_groups={row.conv_groups} is not that of a layer")
    choice = row.choice
    assert choice is not None
    try:
        choice.decomposition.check(choice.shape)
    except ArgumentError as e:
        raise PlanError(f"{where}: {e}") from e


def plan_row(layer: Layer, pick: tuple[Candidates, int, str] | None, align: int) -> LayerPlan:
    """The row of a layer: left out without a ``pick`` (candidates, the one chosen, why it stays dense if it does)."""
    groups = layer.shape.conv_groups if layer.shape else 1
    row: dict[str, Any] = {"name": layer.name, "kind": layer.kind, "shape": layer.weight, "conv_groups": groups}
    row |= {"scheme": None, "groups": None, "rank": None, "error": 0.0}
    row |= {"params_before": layer.params, "params_after": layer.params, "reason": layer.reason}
    if pick is None or not isinstance(layer, DecomposableLayer):
        return LayerPlan(**row)
    choices, candidate, reason = pick
    chosen = choices.decomposition(candidate)
    if chosen is None:
        multiples = f" with ranks that are multiples of {align}" if align > 1 else ""
        none = f"no factorisation{multiples} is smaller"
        return LayerPlan(**{**row, "reason": reason if choices.curves else none})
    row |= {**chosen.to_dict(), "error": float(choices.errors[candidate])}
    row["params_after"] -= layer.shape.numel - chosen.params(layer.shape)
    return LayerPlan(**row)


def _error_text(error: float) -> str:
    """With two digits at least: sensitivities may be small."""
    return "0" if error == 0 else f"{error:.4f}" if error >= 1e-3 else f"{error:.1e}"


def row_cells(row: LayerPlan, held_out: bool) -> list[str]:
    """The texts of a row in the table of a plan, with a column for errors on samples kept aside if ``held_out``."""
    chosen = ["-" if v is None else str(v) for v in (row.scheme, row.groups, row.rank)]
    chosen[-1] += f" {row.pivots[:-3]}" if row.pivots else ""
    errors = ["?" if math.isnan(row.error) else _error_text(row.error)]
    if held_out:
        errors.append("-" if row.held_out is None else _error_text(row.held_out))
    name = row.name or "(model)"
    counts = [f"{row.params_before:,}", f"{row.params_after:,}"]
    return [name, row.kind, shape_text(row.shape), *chosen, *errors, *counts, row.reason or row.remark or ""]


def warn_if_apart(rows: Sequence[LayerPlan]) -> None:
    """Say so where the errors of calibration are not those of samples that were kept aside."""
    pairs = [(row.error, row.held_out) for row in rows if row.held_out is not None]
    if not pairs:
        return
    stated, held_out = (math.hypot(*errors) for errors in zip(*pairs, strict=True))
    if held_out > APART * stated or stated > APART * held_out:
        warnings.warn(
            f"on samples kept aside the layers' errors are {held_out:.3g}, stated {stated:.3g} (root of the sum of "
            f"squares): data= is not enough, or too much alike; pass more samples that differ",
            stacklevel=3,
        )


def is_edited(rows: list[dict[str, Any]]) -> bool:
    """Whether a row of a plan in JSON was edited by hand."""
    return any(choice_fields(row) != row["error_is_of"] for row in rows)


def choice_fields(row: Mapping[str, Any]) -> list[Any]:
    """Scheme, groups and rank; pivots where there are any, which older plans do not know."""
    return [row["scheme"], row["groups"], row["rank"], *([row["pivots"]] if row.get("pivots") else [])]
