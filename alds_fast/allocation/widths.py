"""How many hidden units every group keeps: what loses least at one price of a parameter for the whole model.

Of a group with some number of units left, the squared error is that of the removal and those of its layers' ranks
together. At a price every layer and every group takes what has the least sum of squared error and price times cost; the
lowest price at which all fits the budget decides (Everett, "Generalized Lagrange multiplier method", Operations
Research 11, 1963). The ranks are then allocated exactly for these numbers of units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .pareto import Floats, Front

BISECTIONS = 100


class Width(NamedTuple):
    """A number of units of one group: the squared error of removing the others, and fronts of its layers' choices."""

    square: float
    fronts: Sequence[Front]


def _best(front: Front, price: float) -> tuple[float, float]:
    """Squared error and cost of what is best at a price."""
    squares: Floats = front.errors**2
    at = int(np.argmin(squares + price * front.costs))
    return float(squares[at]), float(front.costs[at])


def _of_width(width: Width, price: float) -> tuple[float, float]:
    best = [_best(front, price) for front in width.fronts]
    return width.square + sum(square for square, _ in best), sum(cost for _, cost in best)


def widths_at_one_price(
    others: Sequence[Front], groups: Sequence[Sequence[Width]], budget: float
) -> tuple[list[int], float]:
    """Which of its widths every group takes, and the price; ``others`` are the fronts of layers in no group.

    Where nothing fits the budget, what is cheapest.
    """

    def at(price: float) -> tuple[float, list[int]]:
        cost, picks = sum(_best(front, price)[1] for front in others), []
        for widths in groups:
            found = [_of_width(width, price) for width in widths]
            picks.append(min(range(len(found)), key=lambda i: found[i][0] + price * found[i][1]))
            cost += found[picks[-1]][1]
        return cost, picks

    fronts = [*others, *(front for widths in groups for width in widths for front in width.fronts)]
    squares = sum(float((front.errors**2).max()) for front in fronts)
    low, high = 1e-30 * (squares + 1e-300), squares + 1e-300  # per unit of cost: nothing is worth more than all errors
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        if at(middle)[0] <= budget:
            high = middle
        else:
            low = middle
    return at(high)[1], high
