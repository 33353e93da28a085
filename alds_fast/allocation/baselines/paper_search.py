"""The paper's own search, to compare the exact allocator against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import BudgetError
from ..candidates import Candidates
from ..one_budget import minimax
from ..pareto import Front, Ints, errors_of, pareto_front, threshold, total_cost

SEEDS = 15
MAX_ROUNDS = 30


def _curve_front(layer: Candidates, curve: int) -> Front:
    """Front of one curve and the dense layer, indexed in the layer's candidates."""
    c = layer.curves[curve]
    front = pareto_front(np.append(c.costs, layer.dense_cost), np.append(c.errors, 0.0))
    dense = front.index == len(c.costs)
    return Front(front.costs, front.errors, np.where(dense, layer.starts[-1], front.index + layer.starts[curve]))


def _least_threshold(fronts: Sequence[Front], budget: int) -> Ints | None:
    """Constant error over the layers, the least that fits the budget; None if not even the cheapest points fit."""
    try:
        best = minimax(fronts, budget).bound
    except BudgetError:
        return None
    return threshold(fronts, best)


def _best_curve(layer: Candidates, cost: int, current: int) -> int:
    """The curve with the least error among its candidates of at most ``cost``; the current one if none fits."""
    reach = [int(np.searchsorted(c.costs, cost, side="right")) - 1 for c in layer.curves]
    errors = [c.errors[r] if r >= 0 else np.inf for c, r in zip(layer.curves, reach, strict=True)]
    best = int(np.argmin(errors))
    return best if errors[best] < np.inf else current


def alds_heuristic(layers: Sequence[Candidates], budget: int) -> list[int]:
    """The paper's alternating search: candidate index per layer, the best of 15 random starts.

    From random (scheme, groups) for every layer: give all layers the least common error that meets the budget; then,
    at the cost each layer got, pick the (scheme, groups) with the least error; again until nothing changes. Algorithm
    1 of Liebenwein, Maalouf, Feldman, Rus, NeurIPS 2021, with the schemes as part of the search and the dense layer
    allowed. Raises BudgetError if no start meets the budget.
    """
    best: list[int] | None = None
    best_error = np.inf
    for seed in range(SEEDS):
        attempt = _search(layers, budget, np.random.default_rng(seed))
        if attempt is not None and (best is None or attempt[1] < best_error):
            best, best_error = attempt
    if best is None:
        raise BudgetError(
            f"alds-heuristic found no allocation with a cost of at most {budget} in {SEEDS} starts; use method='alds'"
        )
    return best


def _search(layers: Sequence[Candidates], budget: int, rng: np.random.Generator) -> tuple[list[int], float] | None:
    curves = [int(rng.integers(len(layer.curves))) if layer.curves else -1 for layer in layers]
    best: tuple[list[int], float] | None = None
    for _ in range(MAX_ROUNDS):
        fronts = [layer.front() if c < 0 else _curve_front(layer, c) for layer, c in zip(layers, curves, strict=True)]
        picks = _least_threshold(fronts, budget)
        if picks is None:  # spread the whole budget in proportion to the dense costs and let the curves adapt
            dense = sum(layer.dense_cost for layer in layers)
            costs = [budget * layer.dense_cost // dense for layer in layers]
        else:
            error = float(errors_of(fronts, picks).max(initial=0.0))
            if best is None or error < best[1]:
                best = [int(f.index[i]) for f, i in zip(fronts, picks, strict=True)], error
            assert total_cost(fronts, picks) <= budget
            costs = [int(f.costs[i]) for f, i in zip(fronts, picks, strict=True)]
        fresh = [
            _best_curve(layer, cost, c) if layer.curves else -1
            for layer, cost, c in zip(layers, costs, curves, strict=True)
        ]
        if fresh == curves:
            break
        curves = fresh
    return best
