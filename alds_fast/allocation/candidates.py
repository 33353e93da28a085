"""Every choice of a layer: all ranks of all (scheme, groups), and staying dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..linalg import Decomposition, WeightShape, params_per_rank
from .pareto import Floats, Front, Ints, pareto_front


@dataclass(frozen=True)
class Curve:
    """Ranks align, 2 align, ... of one (scheme, groups): ``costs`` ascending; ``errors`` by rank."""

    scheme: int
    groups: int
    align: int
    costs: Ints
    errors: Floats

    @property
    def ranks(self) -> Ints:
        """Ranks of its candidates."""
        return self.align * np.arange(1, len(self.costs) + 1, dtype=np.int64)


@dataclass(frozen=True)
class Candidates:
    """Every choice of one layer, numbered curve after curve, the dense layer last."""

    curves: tuple[Curve, ...]
    dense_cost: int

    @property
    def costs(self) -> Ints:
        """Costs of all candidates."""
        return np.concatenate([*(c.costs for c in self.curves), [self.dense_cost]]).astype(np.int64)

    @property
    def errors(self) -> Floats:
        """Errors of all candidates."""
        return np.concatenate([*(c.errors for c in self.curves), [0.0]])

    @property
    def starts(self) -> Ints:
        """Number of the first candidate of every curve, then that of the dense layer."""
        return np.cumsum([0, *(len(c.costs) for c in self.curves)])

    def front(self) -> Front:
        """Pareto front over all curves and the dense layer."""
        return pareto_front(self.costs, self.errors)

    def few_groups(self, limit: int) -> Candidates:
        """Only the curves of at most ``limit`` slices, or of the fewest there are."""
        limit = max(limit, min((c.groups for c in self.curves), default=0))
        return Candidates(tuple(c for c in self.curves if c.groups <= limit), self.dense_cost)

    def restrict(self, costs: Ints, only: tuple[int, int] | None = None) -> tuple[Candidates, Ints]:
        """The choices at other costs, all or those of one (scheme, groups) and dense, with their numbers here."""
        spans = list(zip(self.curves, self.starts, self.starts[1:], strict=False))
        spans = [span for span in spans if only in (None, (span[0].scheme, span[0].groups))]
        curves = tuple(replace(curve, costs=costs[begin:end]) for curve, begin, end in spans)
        numbers = np.concatenate([*(np.arange(begin, end) for _, begin, end in spans), [len(costs) - 1]])
        return Candidates(curves, int(costs[-1])), numbers.astype(np.int64)

    def with_costs(self, by_curve: Mapping[tuple[int, int], Ints], dense_cost: int) -> Ints:
        """Costs of all candidates of another kind: those of the ranks of every (scheme, groups), and of dense."""
        return np.concatenate([*(by_curve[c.scheme, c.groups] for c in self.curves), [dense_cost]]).astype(np.int64)

    def decomposition(self, candidate: int) -> Decomposition | None:
        """What a candidate stands for, None for dense."""
        curve = int(np.searchsorted(self.starts, candidate, side="right")) - 1
        if curve == len(self.curves):
            return None
        c = self.curves[curve]
        return Decomposition(c.scheme, c.groups, c.align * (candidate - int(self.starts[curve]) + 1))


def candidates(shape: WeightShape, by_fold: Mapping[tuple[int, int], Tensor], align: int) -> Candidates:
    """All choices of a layer that are smaller than dense, with ranks that are multiples of ``align``, and dense.

    ``by_fold[scheme, groups]`` holds the errors of ranks 0, 1, ...
    """
    curves = []
    for (scheme, groups), values in by_fold.items():
        per_rank = params_per_rank(shape, scheme, groups)
        errors = values.numpy()
        ranks = np.arange(align, min(len(errors) - 1, (shape.numel - 1) // per_rank) + 1, align, dtype=np.int64)
        if len(ranks):
            curves.append(Curve(scheme, groups, align, ranks * per_rank, errors[ranks]))
    return Candidates(tuple(curves), shape.numel)
