"""Several budgets at once: least largest error with every cost within its own budget, and a certified lower bound.

For weights w >= 0 the one combined cost sum_k w_k cost_k / budget_k with the budget sum_k w_k is a relaxation: what
meets every budget meets it too. So an error threshold t cannot be met if, for some w, already the cheapest candidates
with errors of at most t cost more than that. Their total is concave in w (a minimum of linear functions), so the w
that proves a threshold impossible, if there is one, is found by cutting planes: where the cheapest picks prove nothing,
their own use of the budgets bounds the concave function from above and cuts off all w with a bound below zero
(Kelley, "The cutting-plane method for solving convex programs", 1960). Least thresholds are found by bisection over
the candidates' errors. Picks met on the way that keep all budgets are the solution; if those of the least possible
threshold keep them, it is optimal.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .pareto import Floats, Ints, _compiled

MAX_CUTS = 60
MAX_REPAIRS = 64
CERTAIN = 1e-9  # relative excess above which rounding cannot be the reason


@_compiled
def _cheapest(shares: Floats, starts: Ints, ends: Ints, weights: Floats) -> Ints:
    """Of every layer the candidate in starts..ends with the least weighted cost; of equal ones the first."""
    picks = np.empty(len(starts), dtype=np.int64)
    for layer in range(len(starts)):
        best = np.inf
        for c in range(starts[layer], ends[layer]):
            cost = 0.0
            for k in range(len(weights)):
                cost += weights[k] * shares[k, c]
            if cost < best:
                best, picks[layer] = cost, c
    return picks


@_compiled
def _best_repair(shares: Floats, starts: Ints, ends: Ints, picks: Ints, excess: Floats) -> tuple[int, int]:
    """The one change that leaves the least largest excess: (layer, candidate), layer -1 if none lowers it."""
    best_layer, best, least = -1, 0, excess.max()
    for layer in range(len(starts)):
        for c in range(starts[layer], ends[layer]):
            worst = -np.inf
            for k in range(len(excess)):
                worst = max(worst, excess[k] + shares[k, c] - shares[k, picks[layer]])
            if worst < least:
                best_layer, best, least = layer, c, worst
    return best_layer, best


@_compiled
def _spend(costs: Ints, shares: Floats, errors: Floats, starts: Ints, picks: Ints, remaining: Ints) -> None:
    """Improve the worst layer by its cheapest affordable step, again and again; one that cannot is left alone."""
    open_ = np.ones(len(picks), dtype=np.bool_)
    while True:
        layer, worst = -1, 0.0
        for i in range(len(picks)):
            if open_[i] and errors[picks[i]] > worst:
                layer, worst = i, errors[picks[i]]
        if layer < 0:
            return
        here, best, least = picks[layer], -1, np.inf
        for c in range(starts[layer], here):
            dearest, affordable = -np.inf, errors[c] < worst
            for k in range(len(remaining)):
                affordable = affordable and costs[k, c] - costs[k, here] <= remaining[k]
                dearest = max(dearest, shares[k, c] - shares[k, here])
            if affordable and dearest < least:
                best, least = c, dearest
        open_[layer] = best >= 0
        if best >= 0:
            remaining += costs[:, here] - costs[:, best]
            picks[layer] = best


def _cut(corners: list[Floats], normal: Floats) -> list[Floats]:
    """The part of a convex polygon (or segment), given by its corners in order, where normal . w >= 0."""
    kept: list[Floats] = []
    for a, b in zip(corners, corners[1:] + corners[:1], strict=True):
        at_a, at_b = float(normal @ a), float(normal @ b)
        if at_a >= 0:
            kept.append(a)
        if (at_a < 0) != (at_b < 0):
            kept.append((a * at_b - b * at_a) / (at_b - at_a))
    return [c for i, c in enumerate(kept) if not any(np.array_equal(c, other) for other in kept[:i])]


@dataclass(frozen=True)
class _Instance:
    """Candidates of all layers one after the other, by ascending error within a layer; K rows of costs."""

    costs: Ints
    shares: Floats  # costs over their budgets
    errors: Floats
    starts: Ints
    stops: Ints
    index: Ints
    budgets: Ints

    @classmethod
    def of(cls, costs: Sequence[Ints], errors: Sequence[Floats], budgets: Ints) -> _Instance:
        """Of every layer's costs (K, candidates) and errors (candidates,)."""
        orders = [np.argsort(e, kind="stable") for e in errors]
        rows = np.concatenate([c[:, o] for c, o in zip(costs, orders, strict=True)], axis=1)
        stops = np.cumsum([len(o) for o in orders])
        shares = rows / np.maximum(budgets, 1)[:, None]
        ordered = np.concatenate([e[o] for e, o in zip(errors, orders, strict=True)])
        return cls(rows, shares, ordered, np.append(0, stops[:-1]), stops, np.concatenate(orders), budgets)

    def ends(self, error: float) -> Ints:
        """Where the candidates with an error of at most ``error`` end, per layer."""
        pairs = zip(self.starts, self.stops, strict=True)
        return np.array([a + np.searchsorted(self.errors[a:b], error, side="right") for a, b in pairs])

    def remaining(self, picks: Ints) -> Ints:
        """What the picks leave of every budget; negative where one is exceeded."""
        return self.budgets - self.costs[:, picks].sum(axis=1)

    def meet(self, error: float) -> tuple[Ints | None, bool]:
        """Picks with errors of at most ``error`` within all budgets, or None and whether it is sure there are none."""
        ends, corners = self.ends(error), list(np.eye(len(self.budgets)))
        if (ends == self.starts).any():
            return None, True
        nearest, least = self.starts, np.inf
        for _ in range(MAX_CUTS):
            weights = np.mean(corners, axis=0)
            picks = _cheapest(self.shares, self.starts, ends, weights)
            excess = -self.remaining(picks) / np.maximum(self.budgets, 1)
            if excess.max() <= 0:
                return picks, False
            if weights @ excess > CERTAIN * weights.sum():
                return None, True
            if excess.max() < least:
                nearest, least = picks, float(excess.max())
            corners = _cut(corners, excess)
            if not corners:
                break
        return self._repair(nearest, ends), False

    def _repair(self, picks: Ints, ends: Ints) -> Ints | None:
        """The picks with a few layers changed so that they keep the budgets, None if that is not found."""
        for _ in range(MAX_REPAIRS):
            remaining = self.remaining(picks)
            if remaining.min() >= 0:
                return picks
            excess = -remaining / np.maximum(self.budgets, 1)
            layer, candidate = _best_repair(self.shares, self.starts, ends, picks, excess)
            if layer < 0:
                return None
            picks = picks.copy()
            picks[layer] = candidate
        return None


def least_largest(costs: Sequence[Ints], errors: Sequence[Floats], budgets: Ints) -> tuple[Ints, float] | None:
    """One candidate per layer with the least largest error found within all budgets, and a lower bound of the least.

    ``costs[i]`` is (budgets, candidates of layer i), ``errors[i]`` (candidates,), ``budgets`` (budgets,). What is left
    over goes to the worst layers first. The true least largest error is at least the bound: where the largest error
    of the picks equals it, they are optimal. None if no picks within all budgets were found at all.
    """
    instance = _Instance.of(costs, errors, budgets)
    levels = np.unique(instance.errors)
    meet = lru_cache(maxsize=None)(lambda i: instance.meet(float(levels[i])))
    possible = bisect_left(range(len(levels)), True, key=lambda i: not meet(i)[1])
    met = possible + bisect_left(range(possible, len(levels)), True, key=lambda i: meet(i)[0] is not None)
    within = meet(met)[0] if met < len(levels) else None
    if within is None:
        return None
    picks = within.copy()
    _spend(instance.costs, instance.shares, instance.errors, instance.starts, picks, instance.remaining(picks))
    return instance.index[picks], float(levels[possible])


def least_budget(costs: Sequence[Ints], errors: Sequence[Floats], budgets: Ints, k: int) -> int:
    """The smallest budget k found that can be met together with the others, whatever the errors."""
    top = max(float(e.max()) for e in errors)
    low = sum(int(c[k].min()) for c in costs)
    high = sum(int(c[k].max()) for c in costs)

    def met(extra: int) -> bool:
        raised = budgets.copy()
        raised[k] = low + extra
        return _Instance.of(costs, errors, raised).meet(top)[0] is not None

    return low + bisect_left(range(high - low), True, key=met)
