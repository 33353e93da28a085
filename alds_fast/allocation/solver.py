"""The solvers that budgets go to, and what they found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..criteria import LayerSpectra
from ..errors import ArgumentError, BudgetError
from ..layers import label
from .baselines import BASELINES
from .candidates import Candidates
from .costs import CostTable
from .one_budget import allocate, gap
from .pareto import Front, Ints, p_norm, pareto_front, threshold
from .several_budgets import least_budget, least_largest
from .several_p_norm import least_sum_within


@dataclass(frozen=True)
class Solution:
    """The candidate taken of every layer, and the certified relative distance from the optimum."""

    picks: tuple[int, ...]
    gap: float


def _fronts(choices: Sequence[Candidates], table: CostTable) -> list[Front]:
    return [pareto_front(costs, c.errors) for c, costs in zip(choices, table.costs, strict=True)]


def _relative(value: float, bound: float) -> float:
    return 0.0 if value <= bound else value / bound - 1.0 if bound > 0 else math.inf


def largest_error(choices: Sequence[Candidates], picks: Sequence[int]) -> float:
    """The largest error of the candidates taken."""
    return max((float(c.errors[i]) for c, i in zip(choices, picks, strict=True)), default=0.0)


def _together(choices: Sequence[Candidates], tables: Sequence[CostTable], p: float) -> Solution:
    """All budgets at once; BudgetError, naming what could be reached, where no allocation within all is found."""
    limits = np.array([t.budget() for t in tables], dtype=np.int64)
    if not choices:
        return Solution((), 0.0)
    costs = [np.stack([t.costs[i] for t in tables]) for i in range(len(choices))]
    errors = [c.errors for c in choices]
    result = least_largest(costs, errors, limits)
    if result is None:
        names = " and ".join(t.text for t in tables)
        reach = [t.text_of(t.fixed + least_budget(costs, errors, limits, k)) for k, t in enumerate(tables)]
        raise BudgetError(
            f"{names} cannot be met at once: keeping the others, the smallest found is {' or '.join(reach)}"
        )
    picks, bound = result
    if not math.isinf(p):
        picks, least = least_sum_within(costs, errors, limits, p, picks)
        bound = max(bound, least)  # no p-norm is below the least largest error
    taken = np.array([e[i] for e, i in zip(errors, picks, strict=True)])
    return Solution(tuple(int(i) for i in picks), _relative(p_norm(taken, p), bound))


def solve(choices: Sequence[Candidates], tables: Sequence[CostTable], p: float = math.inf) -> Solution:
    """Least p-norm of the errors within one budget (exact for p = inf) or several.

    Raises BudgetError, naming the budget and the smallest reachable share.
    """
    if len(tables) > 1:
        return _together(choices, tables, p)
    fronts = _fronts(choices, tables[0])
    result = allocate(fronts, tables[0].budget(), p)
    picks = tuple(int(f.index[i]) for f, i in zip(fronts, result.picks, strict=True))
    return Solution(picks, gap(fronts, result.picks, result.bound, p))


def solve_baseline(
    method: str, choices: Sequence[Candidates], table: CostTable, spectra: Sequence[LayerSpectra]
) -> Solution:
    """One of the baselines under one budget; its largest error's distance from the optimum.

    Their names are those of :data:`alds_fast.allocation.baselines.BASELINES`.

    Raises BudgetError, naming the smallest share that the method reaches, and ArgumentError if a layer was analysed
    without the fold that it uses.
    """
    only = (0, 1) if BASELINES[method].one_slice else None
    for spectrum in spectra if only else ():
        if only not in spectrum.values:
            raise ArgumentError(
                f"method={method!r} uses scheme 0 with one slice, which was not analysed for layer "
                f"{label(spectrum.layer.name)}; analyze with 0 in schemes= and 1 in groups="
            )
    parts = [c.restrict(costs, only) for c, costs in zip(choices, table.costs, strict=True)]
    restrict = replace(table, costs=tuple(part.costs for part, _ in parts))
    picks = BASELINES[method].rule([part for part, _ in parts], spectra, restrict.budget(f" by method={method!r}"))
    taken = tuple(int(numbers[i]) for (_, numbers), i in zip(parts, picks, strict=True))
    bound = allocate(_fronts(choices, table), table.budget()).bound
    return Solution(taken, _relative(largest_error(choices, taken), bound))


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
