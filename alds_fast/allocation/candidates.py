"""Every choice of a layer: all ranks of all (scheme, groups), and staying dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..layers import DecomposableLayer
from ..linalg import (
    Decomposition,
    Pivots,
    WeightShape,
    index_count,
    max_rank,
    params_per_rank,
    pivots_of_fold,
    saved_by_pivots,
)
from .pareto import Floats, Front, Ints, pareto_front

LEAST_IN_HALF = 0.05  # error of truncation, beside which that of rounding to a half type does not count


@dataclass(frozen=True)
class Curve:
    """Multiples of align, from ``first`` on, as ranks of one (scheme, groups, pivots).

    ``costs`` ascending; ``errors`` by rank. ``first`` None stands for align.
    """

    scheme: int
    groups: int
    align: int
    costs: Ints
    errors: Floats
    pivots: Pivots = ""
    first: int | None = None

    @property
    def ranks(self) -> Ints:
        """Ranks of its candidates."""
        first = self.align if self.first is None else self.first
        return first + self.align * np.arange(len(self.costs), dtype=np.int64)

    def part(self, kept: NDArray[np.bool_]) -> Curve:
        """The candidates kept, which are neighbours and at least one."""
        at = np.flatnonzero(kept)
        span = slice(int(at[0]), int(at[-1]) + 1)
        return replace(self, costs=self.costs[span], errors=self.errors[span], first=int(self.ranks[span][0]))

    def decomposition(self, rank: int) -> Decomposition:
        """What a rank of it stands for."""
        return Decomposition(self.scheme, self.groups, rank, self.pivots)


@dataclass(frozen=True)
class Candidates:
    """Every choice of one layer, numbered curve after curve, the dense layer last where it ``may_stay_dense``."""

    curves: tuple[Curve, ...]
    dense_cost: int
    may_stay_dense: bool = True

    @property
    def costs(self) -> Ints:
        """Costs of all candidates."""
        return self.with_costs(lambda curve: curve.costs, self.dense_cost)

    @property
    def errors(self) -> Floats:
        """Errors of all candidates."""
        return np.concatenate([*(c.errors for c in self.curves), *([[0.0]] if self.may_stay_dense else [])])

    @property
    def starts(self) -> Ints:
        """Number of the first candidate of every curve, then that of the dense layer, there or not."""
        return np.cumsum([0, *(len(c.costs) for c in self.curves)])

    def front(self) -> Front:
        """Pareto front over all curves and the dense layer."""
        return pareto_front(self.costs, self.errors)

    def few_groups(self, limit: int) -> Candidates:
        """Only the curves of at most ``limit`` slices, or of the fewest there are."""
        limit = max(limit, min((c.groups for c in self.curves), default=0))
        return replace(self, curves=tuple(c for c in self.curves if c.groups <= limit))

    def limit(self, ranks: tuple[int, int | None], costs: tuple[float, float], may_stay_dense: bool) -> Candidates:
        """Only the candidates of ranks and costs in these ranges, ends included; None for no upper end."""
        most, curves = np.inf if ranks[1] is None else ranks[1], []
        for c in self.curves:
            kept = (c.ranks >= ranks[0]) & (c.ranks <= most) & (c.costs >= costs[0]) & (c.costs <= costs[1])
            if kept.any():
                curves.append(c.part(kept))
        return Candidates(tuple(curves), self.dense_cost, may_stay_dense)

    def restrict(self, costs: Ints, only: tuple[int, int] | None = None) -> tuple[Candidates, Ints]:
        """The choices at other costs, all or those of one (scheme, groups) and dense, with their numbers here."""
        spans = list(zip(self.curves, self.starts, self.starts[1:], strict=False))
        spans = [span for span in spans if only in (None, (span[0].scheme, span[0].groups))]
        curves = tuple(replace(curve, costs=costs[begin:end]) for curve, begin, end in spans)
        numbers = np.concatenate([*(np.arange(begin, end) for _, begin, end in spans), [len(costs) - 1]])
        return Candidates(curves, int(costs[-1])), numbers.astype(np.int64)

    def with_costs(self, by_curve: Callable[[Curve], Ints], dense_cost: int) -> Ints:
        """Costs of all candidates of another kind: those of the ranks of every curve, and of dense."""
        dense = [[dense_cost]] if self.may_stay_dense else []
        return np.concatenate([*map(by_curve, self.curves), *dense]).astype(np.int64)

    def decomposition(self, candidate: int) -> Decomposition | None:
        """What a candidate stands for, None for dense."""
        curve = int(np.searchsorted(self.starts, candidate, side="right")) - 1
        if curve == len(self.curves):
            return None
        c = self.curves[curve]
        return c.decomposition(int(c.ranks[candidate - int(self.starts[curve])]))


def candidates(
    shape: WeightShape,
    by_fold: Mapping[tuple[int, int], Tensor],
    align: int,
    pivots_from: float | None = None,
    stored: int | None = None,
) -> Candidates:
    """All choices of a layer that are smaller than dense, with ranks that are multiples of ``align``, and dense.

    ``by_fold[scheme, groups]`` holds the errors of ranks 0, 1, ... Choices with pivots are those with errors of
    ``pivots_from`` at least; None for none. ``stored``: parameters of the layer as it is, where these are not those of
    a dense weight.
    """
    curves, dense = [], shape.numel if stored is None else stored
    for (scheme, groups), values in by_fold.items():
        for pivots in forms_of_fold(shape, scheme, groups) if pivots_from is not None else ("",):
            costs, errors = costs_of_ranks(shape, scheme, groups, pivots)[: len(values)], values.numpy()
            last = int(np.searchsorted(costs, min(dense, shape.numel))) - 1
            if pivots and pivots_from:
                last = min(last, int((np.minimum.accumulate(errors) >= pivots_from).sum()) - 1)
            ranks = np.arange(align, last + 1, align, dtype=np.int64)
            if len(ranks):
                curves.append(Curve(scheme, groups, align, costs[ranks], errors[ranks], pivots))
    return Candidates(tuple(curves), dense)


def least_error_of_pivots(layer: DecomposableLayer) -> float:
    """From which error on factors with pivots serve: rounding to half types costs them up to .8 % of the weight."""
    weight: Any = layer.module.weight
    return LEAST_IN_HALF if weight.dtype.itemsize < 4 else 0.0


def forms_of_fold(shape: WeightShape, scheme: int, groups: int) -> tuple[Pivots, ...]:
    """Plain factors, and with pivots where the fold and number of slices has them."""
    pivots = pivots_of_fold(shape, scheme, groups)
    return ("", pivots) if pivots else ("",)


def costs_of_ranks(shape: WeightShape, scheme: int, groups: int, pivots: Pivots) -> Ints:
    """Parameters of ranks 0, 1, ... up to the full one; indices of pivots count as such."""
    ranks = np.arange(max_rank(shape, scheme, groups) + 1, dtype=np.int64)
    plain = ranks * params_per_rank(shape, scheme, groups)
    return plain - saved_by_pivots(shape, groups, ranks) + index_count(shape, pivots) if pivots else plain
