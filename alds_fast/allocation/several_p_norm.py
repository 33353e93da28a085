"""Several budgets at once: small p-norm of the errors with every cost within its own budget, and a lower bound.

With multipliers m >= 0 every layer takes the candidate with the least error^p + sum_k m_k cost_k / budget_k; the sum of
these minima less sum_k m_k is below the least sum of errors^p within all budgets, and concave in m (Lagrangian
relaxation). It is maximised by cutting planes (Kelley, "The cutting-plane method for solving convex programs", 1960).
Picks within all budgets are those of multipliers scaled up until they are, and what is left over goes to the moves that
lower the sum most.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .pareto import Floats, Ints, _compiled, p_norm

MAX_PLANES = 40
CLOSE = 1e-4  # relative distance of the bound from what the cuts still allow, at which there are no more
MAX_DOUBLINGS = 60
HALVINGS = 12


@_compiled
def _least(values: Floats, shares: Floats, starts: Ints, stops: Ints, multipliers: Floats) -> tuple[Ints, float]:
    """Of every layer the candidate with the least value + multipliers . shares, and the sum of these."""
    picks, total = np.empty(len(starts), dtype=np.int64), 0.0
    for layer in range(len(starts)):
        best = np.inf
        for c in range(starts[layer], stops[layer]):
            value = values[c]
            for k in range(len(multipliers)):
                value += multipliers[k] * shares[k, c]
            if value < best:
                best, picks[layer] = value, c
        total += best
    return picks, total


@_compiled
def _spend_on_sum(costs: Ints, values: Floats, starts: Ints, stops: Ints, picks: Ints, remaining: Ints) -> None:
    """Make the affordable move that lowers the sum of values most, again and again."""
    while True:
        at, move, fall = -1, 0, 0.0
        for layer in range(len(picks)):
            here = picks[layer]
            for c in range(starts[layer], stops[layer]):
                if values[here] - values[c] > fall:
                    affordable = True
                    for k in range(len(remaining)):
                        affordable = affordable and costs[k, c] - costs[k, here] <= remaining[k]
                    if affordable:
                        at, move, fall = layer, c, values[here] - values[c]
        if at < 0:
            return
        remaining += costs[:, picks[at]] - costs[:, move]
        picks[at] = move


class _Instance:
    """Candidates of all layers one after the other, those with errors above ``limit`` left out."""

    def __init__(self, costs: Sequence[Ints], errors: Sequence[Floats], budgets: Ints, p: float, limit: float) -> None:
        kept = [np.flatnonzero(e <= limit) for e in errors]
        self.index, self.budgets = np.concatenate(kept), budgets
        self.stops = np.cumsum([len(k) for k in kept])
        self.starts = np.append(0, self.stops[:-1])
        self.costs = np.ascontiguousarray(np.concatenate([c[:, k] for c, k in zip(costs, kept, strict=True)], axis=1))
        self.shares = self.costs / np.maximum(budgets, 1)[:, None]
        self.values = np.concatenate([(e[k] / limit) ** p for e, k in zip(errors, kept, strict=True)])

    def least(self, multipliers: Floats) -> tuple[Ints, float, Floats]:
        """Picks for these multipliers, the relaxation's value, and how far each budget is exceeded."""
        picks, total = _least(self.values, self.shares, self.starts, self.stops, multipliers)
        return picks, total - float(multipliers.sum()), self.shares[:, picks].sum(axis=1) - 1.0

    def fits(self, picks: Ints) -> bool:
        """Whether they keep all budgets."""
        return bool((self.costs[:, picks].sum(axis=1) <= self.budgets).all())

    def best_multipliers(self) -> tuple[Floats, float]:
        """Those with the largest relaxation found, and that."""
        linprog: Any = importlib.import_module("scipy.optimize").linprog
        count = len(self.budgets)
        best, bound, multipliers = np.zeros(count), -np.inf, np.full(count, self.values.sum() / count)
        most, rows, limits = 1e3 * max(1.0, float(self.values.max())) * len(self.starts), [], []
        for _ in range(MAX_PLANES):
            _, value, excess = self.least(multipliers)
            if value > bound:
                best, bound = multipliers, value
            rows.append([*-excess, 1.0])
            limits.append(value - float(excess @ multipliers))
            result = linprog([0.0] * count + [-1.0], rows, limits, bounds=[(0, most)] * count + [(None, None)])
            if not result.success or -result.fun - bound <= CLOSE * max(1e-12, abs(bound)):
                break
            multipliers = np.asarray(result.x[:count])
        return best, bound

    def within(self, multipliers: Floats) -> Ints | None:
        """Picks within all budgets, of the multipliers scaled up no more than they must be."""
        start = np.maximum(multipliers, 1e-6)
        low, high = 0.0, 1.0
        for _ in range(MAX_DOUBLINGS):
            picks = self.least(start * high)[0]
            if self.fits(picks):
                break
            low, high = high, 2.0 * high
        else:
            return None
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            tried = self.least(start * middle)[0]
            low, high, picks = (low, middle, tried) if self.fits(tried) else (middle, high, picks)
        return picks


def least_sum_within(
    costs: Sequence[Ints], errors: Sequence[Floats], budgets: Ints, p: float, known: Ints
) -> tuple[Ints, float]:
    """One candidate per layer with a small p-norm of the errors within all budgets, and a lower bound of the least.

    Arguments as for :func:`alds_fast.allocation.several_budgets.least_largest`; ``known`` are picks within all budgets,
    which the result is no worse than.
    """
    taken = np.array([e[i] for e, i in zip(errors, known, strict=True)])
    limit = p_norm(taken, p)
    if limit == 0.0:
        return known, 0.0
    instance = _Instance(costs, errors, budgets, p, limit * (1 + 1e-12))
    multipliers, bound = instance.best_multipliers()
    picks = instance.within(multipliers)
    best = known
    if picks is not None:
        remaining = budgets - instance.costs[:, picks].sum(axis=1)
        _spend_on_sum(instance.costs, instance.values, instance.starts, instance.stops, picks, remaining)
        better = instance.index[picks]
        norm = p_norm(np.array([e[i] for e, i in zip(errors, better, strict=True)]), p)
        best = better if norm < limit else known
    return best, limit * max(0.0, bound) ** (1.0 / p)
