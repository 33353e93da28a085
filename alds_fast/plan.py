"""A plan: for every layer what replaces it, why, and what it costs."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .discover import count_params
from .errors import AldsError, ModelError, PlanError
from .factorize import Choice, factorize
from .folding import WeightShape, distinct_schemes, max_rank, params_per_rank
from .text import shape_text, table

FORMAT = "alds_fast.plan"
VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """One row of a plan.

    ``scheme``, ``groups`` and ``rank`` are None for a layer that stays dense, and ``reason`` then says why. ``error``
    is the relative error of the plan's criterion (0 for a dense layer, NaN for a row edited by hand). Parameters are
    the layer's own, bias included.
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

    @property
    def choice(self) -> Choice | None:
        """What to put in the layer's place, None if it stays dense."""
        if self.scheme is None or self.groups is None or self.rank is None:
            return None
        shape = WeightShape(self.shape[0], self.shape[1] * self.conv_groups, self.shape[2:], self.conv_groups)
        return Choice(self.name, shape, self.scheme, self.groups, self.rank)


def params_of(choice: Choice) -> int:
    """Parameters of encoder and decoder."""
    return choice.rank * params_per_rank(choice.shape, choice.scheme, choice.groups)


@dataclass(frozen=True)
class Plan:
    """The whole-model allocation; made by :meth:`alds_fast.Analysis.plan`, applied by :meth:`apply`.

    Attributes:
        layers: one :class:`LayerPlan` per layer, those left out included.
        params_before: parameters of the dense model, shared ones once.
        budget, criterion, method, p, align: how it was made; ``budget`` as "params=0.5" or "error=0.3".
        gap: certified relative distance of the p-norm of the errors from its optimum; 0 for the exact p = inf, NaN
            for a plan
            edited by hand.
    """

    layers: tuple[LayerPlan, ...]
    params_before: int
    budget: str
    criterion: str
    method: str
    p: float
    align: int
    gap: float
    spectra: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def params(self) -> int:
        """Parameters of the compressed model, shared ones once."""
        return self.params_before - sum(row.params_before - row.params_after for row in self.layers)

    @property
    def keep_ratio(self) -> float:
        """Share of the parameters kept, in (0, 1]."""
        return self.params / self.params_before if self.params_before else 1.0

    @property
    def error(self) -> float:
        """The largest relative error over the layers; NaN if a row was edited by hand."""
        errors = [row.error for row in self.layers]
        return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)

    def apply(self, model: nn.Module) -> nn.Module:
        """A new model with the layers replaced; ``model`` is not changed.

        Errors hold before rounding to the weights' type: exactly, but for criterion "frobenius" under a budget on
        parameters, where large layers of low rank are factorised by a randomized SVD within 0.05 % of the stated
        error. The result carries this plan as ``alds_plan`` and, per replaced layer, how its factors were computed as
        ``alds_factors`` (name to :class:`alds_fast.factorize.FactorReport`). Raises LayerNotFoundError, PlanError or
        WeightError where the plan does not fit the model, ModelError if the model cannot be copied.
        """
        if not isinstance(model, nn.Module):
            raise ModelError(f"model is a {type(model).__name__}; pass the torch.nn.Module itself")
        if count_params(model) != self.params_before:
            raise PlanError(f"the plan is for {self.params_before:,} parameters, the model has {count_params(model):,}")
        choices = [row.choice for row in self.layers]
        chosen = [c for c in choices if c is not None]
        exact = self.criterion != "frobenius" or not self.budget.startswith("params")  # errors that must hold
        small, reports = factorize(model, chosen, self.spectra, exact=exact)
        object.__setattr__(small, "alds_plan", self)
        object.__setattr__(small, "alds_factors", reports)
        return small

    def __str__(self) -> str:
        headers = ["layer", "kind", "shape", "scheme", "groups", "rank", "error", "params", "after", "reason"]
        lines = table(headers, [_cells(row) for row in self.layers], left=(0, 1, 9))
        p = "inf" if math.isinf(self.p) else f"{self.p:g}"
        total = (
            f"parameters {self.params_before:,} -> {self.params:,} ({self.keep_ratio:.2%} kept); largest "
            f"{self.criterion} error {self.error:.4f}; asked {self.budget}; method {self.method}, p={p}, "
            f"gap {self.gap:.2g}"
        )
        return f"{lines}\n{total}"

    def to_json(self) -> str:
        """The plan as JSON text; exact round trip with :meth:`from_json`."""
        head: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "budget": self.budget,
            "criterion": self.criterion,
        }
        head |= {"method": self.method, "p": _number(self.p), "align": self.align, "gap": _number(self.gap)}
        rows = [
            {**vars(row), "error": _number(row.error), "error_is_of": [row.scheme, row.groups, row.rank]}
            for row in self.layers
        ]
        return json.dumps({**head, "params_before": self.params_before, "layers": rows}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan, checking every row; raises PlanError that names the row and the field.

        The scheme, groups and rank of a row may have been edited: its params_after is computed anew and its error, no
        longer known, becomes NaN, as does the plan's gap. Set scheme, groups and rank to null to keep a layer dense.
        """
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or data["format"] != FORMAT:
                raise PlanError(f"not a plan: its format is {data['format']!r}, expected {FORMAT!r}")
            if data["version"] > VERSION:
                raise PlanError(f"plan version {data['version']} is newer than {VERSION}; update alds_fast")
            if not isinstance(data["layers"], list):
                raise PlanError("not a plan: layers is not a list")
            layers = tuple(_row(fields) for fields in data["layers"])
            budget, criterion, method = (_checked(data, "plan", n, str) for n in ("budget", "criterion", "method"))
            before, align = (_checked(data, "plan", n, int) for n in ("params_before", "align"))
            p, gap = (_real(data, "plan", n) for n in ("p", "gap"))
            gap = math.nan if any(math.isnan(row.error) for row in layers) else gap
            return cls(layers, before, budget, criterion, method, p, align, gap)
        except AldsError:
            raise
        except KeyError as e:
            raise PlanError(f"not a plan: the field {e} is missing") from e
        except (TypeError, ValueError, AttributeError, RecursionError) as e:
            raise PlanError(f"not a plan: {e}") from e


_FIELDS = {field.name for field in dataclasses.fields(LayerPlan)} | {"error_is_of"}


def _number(value: float) -> float | str | None:
    return None if math.isnan(value) else "inf" if math.isinf(value) else value


def _checked(fields: dict[str, Any], where: str, name: str, kind: type) -> Any:
    """A field of that type; integers must not be negative."""
    value = fields[name]
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
        raise PlanError(f"{where}: {name}={value!r} is not {'a text' if kind is str else 'an integer >= 0'}")
    return value


def _real(fields: dict[str, Any], where: str, name: str) -> float:
    value = fields[name]
    if value is None or value == "inf":
        return math.nan if value is None else math.inf
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise PlanError(f"{where}: {name}={value!r} is not a number >= 0, null or 'inf'")
    return float(value)


def _row(fields: dict[str, Any]) -> LayerPlan:
    if not isinstance(fields, dict) or set(fields) != _FIELDS:
        raise PlanError(f"not a plan: a layer has the fields {sorted(fields)}, expected {sorted(_FIELDS)}")
    where = f"layer {_checked(fields, 'a layer', 'name', str)!r}"
    shape, triple = fields["shape"], [fields[name] for name in ("scheme", "groups", "rank")]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise PlanError(f"{where}: shape={shape!r} is not a list of integers >= 0")
    if any(v is None for v in triple) != all(v is None for v in triple):
        raise PlanError(f"{where}: scheme, groups and rank must be all null or all integers, got {triple}")
    if fields["reason"] is not None:
        _checked(fields, where, "reason", str)
    counts = {n: _checked(fields, where, n, int) for n in ("conv_groups", "params_before", "params_after")}
    known: dict[str, Any] = {
        "kind": _checked(fields, where, "kind", str),
        "error": _real(fields, where, "error"),
        **counts,
    }
    known |= {n: v for n, v in fields.items() if n != "error_is_of" and n not in known}
    row = LayerPlan(**{**known, "shape": tuple(shape)})
    if row.rank is not None:
        _check_choice(row, where)
    if triple == fields["error_is_of"]:
        return row
    choice = row.choice
    after = row.params_before + (params_of(choice) - choice.shape.numel if choice else 0)
    reason = None if choice else "kept dense by hand"
    return LayerPlan(**{**vars(row), "params_after": after, "error": math.nan if choice else 0.0, "reason": reason})


def _check_choice(row: LayerPlan, where: str) -> None:
    if any(type(v) is not int for v in (row.scheme, row.groups, row.rank)):
        raise PlanError(f"{where}: scheme, groups and rank must be integers")
    if len(row.shape) < 2 or 0 in row.shape or row.conv_groups < 1 or row.shape[0] % row.conv_groups:
        raise PlanError(f"{where}: shape={row.shape} with conv_groups={row.conv_groups} is not that of a layer")
    choice = row.choice
    assert choice is not None
    distinct_schemes((choice.scheme,), choice.shape.kernel)
    if choice.groups < 1 or choice.shape.slice_channels % choice.groups:
        raise PlanError(f"{where}: groups={choice.groups} does not divide its {choice.shape.slice_channels} channels")
    full = max_rank(choice.shape, choice.scheme, choice.groups)
    if not 1 <= choice.rank <= full:
        raise PlanError(f"{where}: rank={choice.rank} is outside 1..{full}")


def _cells(row: LayerPlan) -> list[str]:
    chosen = ["-" if v is None else str(v) for v in (row.scheme, row.groups, row.rank)]
    error = "?" if math.isnan(row.error) else f"{row.error:.4f}"
    name = row.name or "(model)"
    counts = [f"{row.params_before:,}", f"{row.params_after:,}"]
    return [name, row.kind, shape_text(row.shape), *chosen, error, *counts, row.reason or ""]
