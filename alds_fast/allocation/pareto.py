"""Pareto fronts of candidates, and sums over layers of what is picked from them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import unreachable

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@functools.cache
def _machine_code(function: Callable) -> Callable:
    """The function compiled with numba, kept for all processes where there is a place to keep the result."""
    from numba import njit  # takes as long to import as half of torch

    try:
        return njit(cache=True)(function)
    except RuntimeError:  # numba found no writable directory
        return njit(function)


def _compiled(function: Callable) -> Callable:
    """Compile with numba at the first call."""

    @functools.wraps(function)
    def call(*args: object) -> object:
        return _machine_code(function)(*args)

    return call


@dataclass(frozen=True)
class Front:
    """Pareto front of a layer: ``costs`` ascending, ``errors`` strictly descending, ``index`` of its candidates."""

    costs: Ints
    errors: Floats
    index: Ints


def pareto_front(costs: Ints, errors: Floats) -> Front:
    """The candidates that no other one beats in both cost and error; of equal ones the first stays.

    >>> pareto_front(np.array([3, 1, 2, 5]), np.array([0.2, 0.5, 0.5, 0.0])).index
    array([1, 0, 3])
    """
    useful = np.flatnonzero(costs <= costs[errors == errors.min()].min())  # no dearer than the cheapest best one
    order = useful[np.argsort(costs[useful], kind="stable")]
    ascending, errors = costs[order], errors[order]
    best = np.minimum.accumulate(errors)
    keep = np.ones(len(order), dtype=bool)
    keep[1:] = errors[1:] < best[:-1]
    kept = np.flatnonzero(keep)  # errors strictly descend; of equal costs the last one is the best
    last = np.append(np.diff(ascending[kept]) > 0, True)
    kept = kept[last]
    return Front(ascending[kept], errors[kept], order[kept])


def threshold(fronts: Sequence[Front], error: float) -> Ints:
    """The cheapest point with an error of at most ``error`` on every front."""
    return np.array([np.searchsorted(-f.errors, -error) for f in fronts], dtype=np.int64)


def total_cost(fronts: Sequence[Front], picks: Ints) -> int:
    """Sum of the picked costs."""
    return sum(int(f.costs[i]) for f, i in zip(fronts, picks, strict=True))


def errors_of(fronts: Sequence[Front], picks: Ints) -> Floats:
    """The picked errors."""
    return np.array([f.errors[i] for f, i in zip(fronts, picks, strict=True)], dtype=np.float64)


def p_norm(errors: Floats, p: float) -> float:
    """(sum errors^p)^(1/p), the largest for p = inf, 0 for none; scaled so that it does not underflow."""
    top = float(errors.max(initial=0.0))
    if top == 0.0 or np.isinf(p):
        return top
    return top * float(((errors / top) ** p).sum()) ** (1.0 / p)


def check_budget(fronts: Sequence[Front], budget: int) -> None:
    """BudgetError, naming the smallest reachable cost, if even the cheapest points do not fit."""
    least = total_cost(fronts, np.zeros(len(fronts), dtype=np.int64))
    if least > budget:
        raise unreachable(budget, least)


@_compiled
def _lower_hull(x: Floats, y: Floats) -> Ints:
    """Indices of the lower convex hull of points with x ascending and y descending."""
    hull = np.empty(len(x), dtype=np.int64)
    n = 0
    for i in range(len(x)):
        while n > 1:
            a, b = hull[n - 2], hull[n - 1]
            if (y[b] - y[a]) * (x[i] - x[b]) < (y[i] - y[b]) * (x[b] - x[a]):
                break
            n -= 1
        hull[n] = i
        n += 1
    return hull[:n].copy()
