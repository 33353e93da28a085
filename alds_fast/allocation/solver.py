"""Budgets as integer costs of every candidate, and the solvers that they go to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..criteria import LayerSpectra
from ..errors import ArgumentError, BudgetError
from ..layers import Layer, label
from ..measurement import InputSpec, dense_flops, flops_per_rank
from .baselines import BASELINES, ONE_SLICE
from .candidates import Candidates
from .one_budget import Front, Ints, allocate, gap, pareto_front, threshold
from .several_budgets import least_budget, least_largest

Calls = Mapping[str, Mapping[InputSpec, int]]


@dataclass(frozen=True)
class CostTable:
    """One budget: integer costs of every candidate of every layer, of all the rest of the model, and what is allowed.

    ``costs[i]`` are numbered like the candidates of layer i; ``fixed`` is what the model costs beside these layers,
    ``total`` what the dense model costs and ``limit`` what the compressed one may. One ``unit`` is ``scale`` of them.
    """

    name: str
    share: float
    costs: tuple[Ints, ...]
    fixed: int
    total: int
    limit: int
    unit: str
    scale: int = 1

    @property
    def least(self) -> int:
        """The smallest cost that the compressed model can have."""
        return self.fixed + sum(int(c.min()) for c in self.costs)

    def cost(self, found: Sequence[int]) -> int:
        """What the model costs with these candidates."""
        return self.fixed + sum(int(c[i]) for c, i in zip(self.costs, found, strict=True))

    def share_text(self, cost: int) -> str:
        """name=share of a cost, rounded up, as it would be asked for."""
        return f"{self.name}={math.ceil(10_000 * cost / self.total) / 10_000:g}"

    def amount(self, cost: int) -> str:
        """The cost in its unit, without it."""
        return f"{cost:,}" if self.scale == 1 else f"{cost / self.scale:,.4g}"

    def budget(self, how: str = "") -> int:
        """What the layers may cost together; BudgetError if even the cheapest candidates (chosen ``how``) cost more."""
        if self.least > self.limit:
            raise BudgetError(
                f"{self.name}={self.share:g} cannot be met{how}: the smallest reachable is "
                f"{self.share_text(self.least)}, {self.amount(self.least)} of {self.amount(self.total)} {self.unit}; "
                f"{self.amount(self.fixed)} of them are not in weights that can be factorised"
            )
        return self.limit - self.fixed


def params_table(choices: Sequence[Candidates], params: int, share: float) -> CostTable:
    """The budget on the model's parameters, of which there are ``params``."""
    costs, fixed = tuple(c.costs for c in choices), params - sum(c.dense_cost for c in choices)
    return CostTable("params", share, costs, fixed, params, math.floor(share * params + 1e-9), "parameters")


def flops_table(
    layers: Sequence[Layer], choices: Sequence[Candidates], calls: Calls, total: int, share: float
) -> CostTable:
    """The budget on the floating-point operations of one run of the model, of which ``total`` were counted."""
    if total == 0:
        raise ArgumentError(
            "flops= needs operations to save, and torch counts none for this model with these example_inputs"
        )
    costs, fixed = [], total
    for layer, choice in zip(layers, choices, strict=True):
        assert layer.shape is not None
        shape, module, own = layer.shape, layer.module, calls[layer.name]
        dense = dense_flops(module, shape, own)
        costs.append(
            choice.costed(
                {
                    (c.scheme, c.groups): c.ranks * flops_per_rank(module, shape, own, c.scheme, c.groups)
                    for c in choice.curves
                },
                dense,
            )
        )
        fixed -= dense
    return CostTable("flops", share, tuple(costs), fixed, total, math.floor(share * total + 1e-9), "FLOPs")


@dataclass(frozen=True)
class Solution:
    """The candidate taken of every layer, and the certified relative distance from the optimum."""

    found: tuple[int, ...]
    gap: float


def _fronts(choices: Sequence[Candidates], table: CostTable) -> list[Front]:
    return [pareto_front(costs, c.errors) for c, costs in zip(choices, table.costs, strict=True)]


def _relative(value: float, bound: float) -> float:
    return 0.0 if value <= bound else value / bound - 1.0 if bound > 0 else math.inf


def largest_error(choices: Sequence[Candidates], found: Sequence[int]) -> float:
    """The largest error of the candidates taken."""
    return max((float(c.errors[i]) for c, i in zip(choices, found, strict=True)), default=0.0)


def _together(choices: Sequence[Candidates], tables: Sequence[CostTable]) -> Solution:
    """All budgets at once; BudgetError, naming what could be reached, where no allocation within all is found."""
    limits = np.array([t.budget() for t in tables], dtype=np.int64)
    if not choices:
        return Solution((), 0.0)
    costs = [np.stack([t.costs[i] for t in tables]) for i in range(len(choices))]
    errors = [c.errors for c in choices]
    result = least_largest(costs, errors, limits)
    if result is None:
        names = " and ".join(f"{t.name}={t.share:g}" for t in tables)
        reach = [t.share_text(t.fixed + least_budget(costs, errors, limits, k)) for k, t in enumerate(tables)]
        raise BudgetError(
            f"{names} cannot be met at once: keeping the others, the smallest found is {' or '.join(reach)}"
        )
    found = tuple(int(i) for i in result[0])
    return Solution(found, _relative(largest_error(choices, found), result[1]))


def solve(choices: Sequence[Candidates], tables: Sequence[CostTable], p: float = math.inf) -> Solution:
    """Least p-norm of the errors within one budget (exact for p = inf), or least largest error within several.

    Raises BudgetError, naming the budget and the smallest reachable share.
    """
    if len(tables) > 1:
        return _together(choices, tables)
    fronts = _fronts(choices, tables[0])
    result = allocate(fronts, tables[0].budget(), p)
    found = tuple(int(f.index[i]) for f, i in zip(fronts, result.picks, strict=True))
    return Solution(found, gap(fronts, result.picks, result.bound, p))


def solve_baseline(
    method: str, choices: Sequence[Candidates], table: CostTable, spectra: Sequence[LayerSpectra]
) -> Solution:
    """One of the baselines under one budget; its largest error's distance from the optimum.

    Their names are those of :data:`alds_fast.allocation.baselines.BASELINES`.

    Raises BudgetError, naming the smallest share that the method reaches, and ArgumentError if a layer was analysed
    without the fold that it uses.
    """
    only = (0, 1) if method in ONE_SLICE else None
    for spectrum in spectra if only else ():
        if only not in spectrum.values:
            raise ArgumentError(
                f"method={method!r} uses scheme 0 with one slice, which was not analysed for layer "
                f"{label(spectrum.layer.name)}; analyze with 0 in schemes= and 1 in groups="
            )
    parts = [c.restricted(costs, only) for c, costs in zip(choices, table.costs, strict=True)]
    own = replace(table, costs=tuple(part.costs for part, _ in parts))
    picks = BASELINES[method]([part for part, _ in parts], spectra, own.budget(f" by method={method!r}"))
    found = tuple(int(numbers[i]) for (_, numbers), i in zip(parts, picks, strict=True))
    bound = allocate(_fronts(choices, table), table.budget()).bound
    return Solution(found, _relative(largest_error(choices, found), bound))


def solve_error(choices: Sequence[Candidates], error: float) -> Solution:
    """The fewest parameters with errors of at most ``error``."""
    fronts = [c.front() for c in choices]
    picks: Ints = threshold(fronts, error)
    return Solution(tuple(int(f.index[i]) for f, i in zip(fronts, picks, strict=True)), 0.0)


def dense_reason(tables: Sequence[CostTable], layer: int) -> str:
    """Why a layer that stays dense does so under these budgets."""
    costs = [t.costs[layer] for t in tables]
    if any((c[:-1] < c[-1]).any() for c in costs):
        return "the budget lets it stay dense"
    called = any(c.any() for c in costs)
    return f"no factorisation saves {' or '.join(t.name for t in tables)}" if called else "it is not called"


def relaxed(table: CostTable, limit: float) -> CostTable:
    """The table with another limit, raised to the smallest that can be met."""
    return replace(table, limit=max(math.floor(limit), table.least))
