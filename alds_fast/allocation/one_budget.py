"""The exact allocator: one candidate per layer, least error under a budget.

Every layer brings its Pareto front: costs ascending, errors strictly descending, the last point being the dense layer
with error 0. For a threshold t every layer independently takes its cheapest point with error <= t; the total cost
S(t) only falls as t grows, so the least largest error is the smallest t among the points' errors with S(t) <= budget.
All functions work for any integer cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .pareto import Floats, Front, Ints, _compiled, _lower_hull, check_budget, errors_of, p_norm, threshold, total_cost


@dataclass(frozen=True)
class Allocation:
    """``picks[i]``: the point taken on front i; ``bound``: no allocation within the budget has a smaller p-norm."""

    picks: Ints
    bound: float


@_compiled
def _sweep(layers: Ints, deltas: Ints, remaining: int, count: int) -> tuple[Ints, int]:
    """Take the moves in order; a layer whose move is not affordable stays where it is for good.

    Returns the number of moves taken by each layer and the index of the first move refused (or the number of moves).
    """
    moves = np.zeros(count, dtype=np.int64)
    frozen = np.zeros(count, dtype=np.bool_)
    first = len(layers)
    for e in range(len(layers)):
        layer = layers[e]
        if frozen[layer]:
            continue
        if deltas[e] <= remaining:
            remaining -= deltas[e]
            moves[layer] += 1
        else:
            frozen[layer] = True
            first = min(first, e)
    return moves, first


def minimax(fronts: Sequence[Front], budget: int) -> Allocation:
    """Least largest error under the budget, exactly, then least second largest, and so on (lexicographic minimax).

    Move i of a layer leaves its point i, so it must be made before the threshold can fall below errors[i]. Going
    through all layers' moves by descending errors[i] is going down t over the merged breakpoints: the first move that
    does not fit leaves its layer at the optimal largest error (of equal errors, the first layer's move first). That
    layer stays there, and what is left over goes on to the others, worst first.
    """
    check_budget(fronts, budget)
    triggers = np.concatenate([f.errors[:-1] for f in fronts] or [np.empty(0)])
    layers = np.repeat(np.arange(len(fronts)), [len(f.costs) - 1 for f in fronts])
    deltas = np.concatenate([np.diff(f.costs) for f in fronts] or [np.empty(0, dtype=np.int64)])
    order = np.argsort(-triggers, kind="stable")
    remaining = budget - sum(int(f.costs[0]) for f in fronts)
    picks, _ = _sweep(layers[order], deltas[order], remaining, len(fronts))
    return Allocation(picks, float(errors_of(fronts, picks).max(initial=0.0)))


@_compiled
def _best_gain(costs: Ints, gains: Floats, starts: Ints, picks: Ints, remaining: int) -> tuple[int, int]:
    """The affordable move with the largest fall of the objective: (layer, point), layer -1 if there is none."""
    best, point, fall = -1, 0, -1.0
    for layer in range(len(picks)):
        begin, end = starts[layer], starts[layer + 1]
        here = begin + picks[layer]
        reach = np.searchsorted(costs[begin:end], costs[here] + remaining, side="right") - 1
        value = gains[here] - gains[begin + reach]
        if value > fall and reach > picks[layer]:
            best, point, fall = layer, reach, value
    return best, point


def _fill(fronts: Sequence[Front], powers: Sequence[Floats], picks: Ints, remaining: int) -> Ints:
    """Spend what is left on the move that lowers the objective most, again and again."""
    costs, gains = np.concatenate([f.costs for f in fronts]), np.concatenate(powers)
    starts = np.concatenate([[0], np.cumsum([len(f.costs) for f in fronts])])
    while True:
        layer, point = _best_gain(costs, gains, starts, picks, remaining)
        if layer < 0:
            return picks
        remaining -= int(fronts[layer].costs[point] - fronts[layer].costs[picks[layer]])
        picks[layer] = point


def least_p_norm(fronts: Sequence[Front], budget: int, p: float, scale: float) -> Allocation:
    """Small sum of errors^p under the budget, with a lower bound: Lagrangian relaxation, then a greedy fill.

    The relaxation of this multiple-choice knapsack is solved by walking the fronts' convex hulls in order of falling
    error per cost (Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research 27 (1979)); its
    value, with the last step taken in part, is the bound. ``scale`` is an error of the order of the optimal ones.
    """
    check_budget(fronts, budget)
    powers = [(f.errors / scale) ** p for f in fronts]
    hulls = [_lower_hull(f.costs.astype(np.float64), y) for f, y in zip(fronts, powers, strict=True)]
    deltas = np.concatenate(
        [np.diff(f.costs[h]) for f, h in zip(fronts, hulls, strict=True)] or [np.empty(0, dtype=np.int64)]
    )
    falls = np.concatenate([-np.diff(y[h]) for y, h in zip(powers, hulls, strict=True)] or [np.empty(0)])
    layers = np.repeat(np.arange(len(fronts)), [len(h) - 1 for h in hulls])
    order = np.argsort(-falls / deltas, kind="stable")
    layers, deltas, falls = layers[order], deltas[order], falls[order]
    remaining = budget - sum(int(f.costs[0]) for f in fronts)
    moves, first = _sweep(layers, deltas, remaining, len(fronts))
    whole = np.bincount(layers[:first], minlength=len(fronts))  # moves of the relaxation that are taken entirely
    relax = sum(float(y[h[m]]) for y, h, m in zip(powers, hulls, whole, strict=True))
    if first < len(falls):
        relax -= float(falls[first]) * (remaining - int(deltas[:first].sum())) / float(deltas[first])
    picks = np.array([h[m] for h, m in zip(hulls, moves, strict=True)], dtype=np.int64)
    if len(fronts):
        picks = _fill(fronts, powers, picks, budget - total_cost(fronts, picks))
    return Allocation(picks, scale * max(relax, 0.0) ** (1.0 / p))


def allocate(fronts: Sequence[Front], budget: int, p: float = np.inf) -> Allocation:
    """Least p-norm of the layers' errors with a total cost of at most ``budget``; exact for p = inf.

    Raises BudgetError, naming the smallest reachable cost, if the budget cannot be met.
    """
    exact = minimax(fronts, budget)
    if np.isinf(p) or exact.bound == 0.0:
        return exact
    # The minimax picks have no larger p-norm than this, so the optimum has no larger error.
    limit = exact.bound * len(fronts) ** (1.0 / p)
    starts = threshold(fronts, limit)
    trimmed = [Front(f.costs[i:], f.errors[i:], f.index[i:]) for f, i in zip(fronts, starts, strict=True)]
    smaller = least_p_norm(trimmed, budget, p, exact.bound)
    picks = min(starts + smaller.picks, exact.picks, key=lambda picks: p_norm(errors_of(fronts, picks), p))
    return Allocation(picks, max(smaller.bound, exact.bound))  # no p-norm is below the least largest error


def gap(fronts: Sequence[Front], picks: Ints, bound: float, p: float) -> float:
    """Certified relative distance from the optimum: p-norm of the picked errors over the lower bound, minus 1.

    0 where that is within rounding; inf where the bound is 0 and the errors are not.
    """
    value = p_norm(errors_of(fronts, picks), p)
    if value <= bound * (1 + 1e-12):
        return 0.0
    return value / bound - 1.0 if bound > 0 else float("inf")
