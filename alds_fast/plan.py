"""A plan: for every layer what replaces it, why, and what it costs."""

from __future__ import annotations

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
        criterion, method, p, align: how it was made.
        gap: certified relative distance of the p-norm of the errors from its optimum; 0 for the exact p = inf, NaN
            for a plan
            edited by hand.
    """

    layers: tuple[LayerPlan, ...]
    params_before: int
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

        The result carries this plan as ``alds_plan`` and, per replaced layer, how its factors were computed as
        ``alds_factors`` (name to :class:`alds_fast.factorize.FactorReport`). Raises LayerNotFoundError, PlanError or
        WeightError where the plan does not fit the model, ModelError if the model cannot be copied.
        """
        if not isinstance(model, nn.Module):
            raise ModelError(f"model is a {type(model).__name__}; pass the torch.nn.Module itself")
        if count_params(model) != self.params_before:
            raise PlanError(f"the plan is for {self.params_before:,} parameters, the model has {count_params(model):,}")
        choices = [row.choice for row in self.layers]
        small, reports = factorize(model, [c for c in choices if c is not None], self.spectra)
        object.__setattr__(small, "alds_plan", self)
        object.__setattr__(small, "alds_factors", reports)
        return small

    def __str__(self) -> str:
        headers = ["layer", "kind", "shape", "scheme", "groups", "rank", "error", "params", "after", "reason"]
        lines = table(headers, [_cells(row) for row in self.layers], left=(0, 1, 9))
        p = "inf" if math.isinf(self.p) else f"{self.p:g}"
        total = (
            f"parameters {self.params_before:,} -> {self.params:,} ({self.keep_ratio:.2%} kept); "
            f"largest {self.criterion} error {self.error:.4f}; method {self.method}, p={p}, gap {self.gap:.2g}"
        )
        return f"{lines}\n{total}"

    def to_json(self) -> str:
        """The plan as JSON text; exact round trip with :meth:`from_json`."""
        rows = [dict(vars(row)) for row in self.layers]
        head = {"format": FORMAT, "version": VERSION, "criterion": self.criterion, "method": self.method}
        head |= {"p": "inf" if math.isinf(self.p) else self.p, "align": self.align, "gap": _number(self.gap)}
        head |= {"params_before": self.params_before}
        for row in rows:
            row["error"] = _number(row["error"])
        return json.dumps({**head, "layers": rows}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan, checking every row; raises PlanError that names the row and the field.

        The scheme, groups and rank of a row may have been edited: its params_after is computed anew and its error, no
        longer known, becomes NaN, as does the plan's gap. Set scheme, groups and rank to null to keep a layer dense.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise PlanError(f"not a plan: its format is {data['format']!r}, expected {FORMAT!r}")
            if data["version"] > VERSION:
                raise PlanError(f"plan version {data['version']} is newer than {VERSION}; update alds_fast")
            layers = tuple(_row(fields) for fields in data["layers"])
            edited = any(math.isnan(row.error) for row in layers)
            gap = math.nan if edited else _unnumber(data["gap"])
            p, before = float(data["p"]), int(data["params_before"])
            return cls(layers, before, str(data["criterion"]), str(data["method"]), p, int(data["align"]), gap)
        except AldsError:
            raise
        except KeyError as e:
            raise PlanError(f"not a plan: the field {e} is missing") from e
        except (TypeError, ValueError, AttributeError) as e:
            raise PlanError(f"not a plan: {e}") from e


def _number(value: float) -> float | str | None:
    return None if math.isnan(value) else "inf" if math.isinf(value) else value


def _unnumber(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def _row(fields: dict[str, Any]) -> LayerPlan:
    stored = LayerPlan(**{**fields, "shape": tuple(fields["shape"]), "error": _unnumber(fields["error"])})
    triple = (stored.scheme, stored.groups, stored.rank)
    if any(v is None for v in triple) != all(v is None for v in triple):
        raise PlanError(
            f"layer {stored.name!r}: scheme, groups and rank must be all null or all integers, got {triple}"
        )
    choice = stored.choice
    after = stored.params_before
    if choice is not None:
        _check_choice(choice)
        after += params_of(choice) - choice.shape.numel
    if after == stored.params_after:
        return stored
    reason = None if choice else "kept dense by hand"
    return LayerPlan(**{**vars(stored), "params_after": after, "error": math.nan if choice else 0.0, "reason": reason})


def _check_choice(choice: Choice) -> None:
    name, shape, scheme, groups, rank = choice
    if any(not isinstance(v, int) or isinstance(v, bool) for v in (scheme, groups, rank)):
        raise PlanError(f"layer {name!r}: scheme, groups and rank must be integers")
    distinct_schemes((scheme,), shape.kernel)
    if groups < 1 or shape.slice_channels % groups:
        raise PlanError(f"layer {name!r}: groups={groups} does not divide its {shape.slice_channels} channels")
    full = max_rank(shape, scheme, groups)
    if not 1 <= rank <= full:
        raise PlanError(f"layer {name!r}: rank={rank} is outside 1..{full}")


def _cells(row: LayerPlan) -> list[str]:
    chosen = ["-" if v is None else str(v) for v in (row.scheme, row.groups, row.rank)]
    error = "?" if math.isnan(row.error) else f"{row.error:.4f}"
    name = row.name or "(model)"
    counts = [f"{row.params_before:,}", f"{row.params_after:,}"]
    return [name, row.kind, shape_text(row.shape), *chosen, error, *counts, row.reason or ""]
