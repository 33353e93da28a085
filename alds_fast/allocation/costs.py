"""What layers and budgets cost: integer costs of every candidate, in parameters or operations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ArgumentError, BudgetError
from ..layers import DecomposableLayer, LowRankLayer
from ..linalg import WeightShape, index_count
from ..measurement import InputSpec, dense_flops, flops_of_ranks
from .candidates import Candidates, Curve
from .pareto import Ints

Calls = Mapping[str, Mapping[InputSpec, int]]
SHARES = {
    "params": "parameters kept",
    "flops": "floating-point operations kept",
    "memory": "the bytes of parameters and buffers kept, and with example inputs of activations",
    "latency": "the dense model's latency that is left",
}
BYTES_PER_MB = 10**6
BYTES_PER_INDEX = 8  # of pivots


@dataclass(frozen=True)
class CostTable:
    """One budget: integer costs of every candidate of every layer, of all the rest of the model, and what is allowed.

    ``asked`` is a share of the dense model's cost, or above 1 a cost. ``costs[i]`` are numbered like the candidates of
    layer i; ``fixed`` is what the model costs beside these layers, ``total`` what the dense model costs and ``limit``
    what the compressed one may. One ``unit`` is ``scale`` of them.
    """

    name: str
    asked: float
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

    def cost(self, picks: Sequence[int]) -> int:
        """What the model costs with these candidates."""
        return self.fixed + sum(int(c[i]) for c, i in zip(self.costs, picks, strict=True))

    @property
    def text(self) -> str:
        """name=what was asked for."""
        return f"{self.name}={amount_text(self.asked)}"

    def text_of(self, cost: int) -> str:
        """name=a cost, as a share rounded up where one was asked for, as it would be asked for."""
        share = math.ceil(10_000 * cost / self.total) / 10_000
        return f"{self.name}={amount_text(share if self.asked <= 1 else cost)}"

    def amount(self, cost: int) -> str:
        """The cost in its unit, without it."""
        return f"{cost:,}" if self.scale == 1 else f"{cost / self.scale:,.4g}"

    def budget(self, how: str = "") -> int:
        """What the layers may cost together; BudgetError if even the cheapest candidates (chosen ``how``) cost more."""
        if self.least > self.limit:
            raise BudgetError(
                f"{self.text} cannot be met{how}: the smallest reachable is "
                f"{self.text_of(self.least)}, {self.amount(self.least)} of {self.amount(self.total)} {self.unit}; "
                f"{self.amount(self.fixed)} of them are not in weights that can be factorised"
            )
        return self.limit - self.fixed


def amount_text(amount: float) -> str:
    """A share, or a whole number above 1 with all its digits."""
    return f"{amount:g}" if amount <= 1 else str(int(amount))


def _limit(asked: float, total: int) -> int:
    """The cost allowed: a share of the total, or itself above 1."""
    return math.floor(asked * total + 1e-9) if asked <= 1 else int(asked)


def params_table(choices: Sequence[Candidates], params: int, asked: float) -> CostTable:
    """The budget on the model's parameters, of which there are ``params``."""
    costs, fixed = tuple(c.costs for c in choices), params - sum(c.dense_cost for c in choices)
    return CostTable("params", asked, costs, fixed, params, _limit(asked, params), "parameters")


def memory_table(
    layers: Sequence[DecomposableLayer],
    choices: Sequence[Candidates],
    total: int,
    asked: float,
    activations: tuple[int, int] = (0, 0),
) -> CostTable:
    """The budget on the bytes of the model's parameters and buffers, of which there are ``total``, and activations.

    Of ``activations`` a run has at its peak: in the dense model, and as assumed in the compressed one. Factors are of
    their weight's type, indices of pivots are int64.
    """
    costs, fixed = [], total + activations[1]
    total += activations[0]
    for layer, choice in zip(layers, choices, strict=True):
        low = isinstance(layer.module, LowRankLayer)
        size = int((layer.module.encoder if low else layer.module.weight).element_size())  # type: ignore[operator]

        def of_curve(curve: Curve, size: int = size, shape: WeightShape = layer.shape) -> Ints:
            indices = index_count(shape, curve.pivots)
            return size * (curve.costs - indices) + BYTES_PER_INDEX * indices

        costs.append(choice.with_costs(of_curve, size * choice.dense_cost))
        fixed -= size * choice.dense_cost
    return CostTable("memory", asked, tuple(costs), fixed, total, _limit(asked, total), "MB", BYTES_PER_MB)


def flops_table(
    layers: Sequence[DecomposableLayer], choices: Sequence[Candidates], calls: Calls, total: int, asked: float
) -> CostTable:
    """The budget on the floating-point operations of one run of the model, of which ``total`` were counted."""
    if total == 0:
        raise ArgumentError(
            "flops= needs operations to save, and torch counts none for this model with these example_inputs"
        )
    costs, fixed = [], total
    for layer, choice in zip(layers, choices, strict=True):
        shape, module, inputs = layer.shape, layer.module, calls[layer.name]
        dense = dense_flops(module, shape, inputs)

        def of_curve(curve: Curve, module: Any = module, shape: WeightShape = shape, inputs: Any = inputs) -> Ints:
            return flops_of_ranks(module, shape, inputs, curve.decomposition(1), curve.ranks)

        costs.append(choice.with_costs(of_curve, dense))
        fixed -= dense
    return CostTable("flops", asked, tuple(costs), fixed, total, _limit(asked, total), "FLOPs")


def relax(table: CostTable, limit: float) -> CostTable:
    """The table with another limit, raised to the smallest that can be met."""
    return replace(table, limit=max(math.floor(limit), table.least))


def corrected_limit(table: CostTable, measured: Sequence[tuple[Sequence[int], float]]) -> float:
    """The cost at which the share asked for is to be expected, by shares of the total ``measured`` with some picks.

    On the line between the two that are next to it, one on either side, or half-way where the last two were on one
    side. Where all are on one side, or the costs of the two are the other way round, by how far the last is off.
    """
    points = [(share, table.cost(picks)) for picks, share in measured]
    below = max((point for point in points if point[0] <= table.asked), default=None)
    above = min((point for point in points if point[0] > table.asked), default=None)
    if below is not None and above is not None and below[1] < above[1]:
        stuck = (points[-1][0] > table.asked) == (points[-2][0] > table.asked)
        part = 0.5 if stuck else (table.asked - below[0]) / (above[0] - below[0])
        return below[1] + part * (above[1] - below[1])
    share, cost = points[-1]
    return table.asked * cost / share
