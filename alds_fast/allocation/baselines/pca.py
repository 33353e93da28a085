"""Ranks of the PCA baseline from the eigenvalues of the layers' output covariances."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import unreachable
from ..pareto import Floats, Ints


def _removals(values: Floats, cost: int) -> tuple[Floats, Ints]:
    """The relative fall of the kept energy per cost when ranks r, r-1, ..., 2 are given up, and these ranks.

    Rising from one removal to the next of a layer (made so where rounding says otherwise): values fall with the rank.
    """
    ranks = np.arange(len(values), 1, -1)
    kept = np.cumsum(values)[ranks - 1]
    falls = np.divide(values[ranks - 1], kept, out=np.zeros(len(ranks)), where=kept > 0)
    return np.maximum.accumulate(falls / cost if cost else np.full(len(ranks), np.inf)), ranks


def pca_ranks(
    eigenvalues: Sequence[Floats], costs_per_rank: Sequence[int], dense_costs: Sequence[int], budget: int
) -> list[int]:
    """Ranks by greedy maximisation of prod_i (energy kept in layer i) under a budget.

    From full rank on, remove again and again the eigenvalue with the least (relative decrease of its layer's kept
    energy) / (cost saved), sigma_j / (sum_{l<=j} sigma_l) / cost_i, until the budget is met; at least one stays in
    every layer. X. Zhang, J. Zou, K. He, J. Sun, "Accelerating very deep convolutional networks for classification and
    detection", IEEE TPAMI 38 (2016), rank selection for the whole model.

    Args:
        eigenvalues: of every layer, of the covariance of its linear output (of the second moment where the layer has
            no bias, which would take up the mean); descending, >= 0, at least one.
        costs_per_rank: what one rank of each layer costs.
        dense_costs: what the layer costs undivided. It counts where the rank would cost as much or more, and the layer
            is then to stay dense.
        budget: what the layers may cost together.

    Returns:
        One rank per layer, 1..len(eigenvalues[i]).

    Raises:
        BudgetError: rank 1 everywhere costs more.

    >>> pca_ranks([np.array([6.0, 3.0, 1.0]), np.array([9.0, 1.0])], [10, 10], [100, 100], 30)
    [2, 1]
    """
    values = [np.maximum(np.asarray(e, dtype=np.float64), 0.0) for e in eigenvalues]  # rounding leaves small negatives
    least = sum(map(min, costs_per_rank, dense_costs))
    if least > budget:
        raise unreachable(budget, least)
    removals = [_removals(v, cost) for v, cost in zip(values, costs_per_rank, strict=True)]
    saved = [
        np.minimum(ranks * cost, dense) - np.minimum((ranks - 1) * cost, dense)
        for (_, ranks), cost, dense in zip(removals, costs_per_rank, dense_costs, strict=True)
    ]
    total = sum(min(len(v) * c, d) for v, c, d in zip(values, costs_per_rank, dense_costs, strict=True))
    order = np.argsort(np.concatenate([np.empty(0), *(scores for scores, _ in removals)]), kind="stable")
    after = total - np.append(0, np.cumsum(np.concatenate([np.empty(0, dtype=np.int64), *saved])[order]))
    count = int(np.argmax(after <= budget))  # the first removals after which the budget is met
    layers = np.repeat(np.arange(len(values)), [len(s) for s in saved])[order[:count]]
    return [len(v) - int(n) for v, n in zip(values, np.bincount(layers, minlength=len(values)), strict=True)]
