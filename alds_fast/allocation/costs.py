"""What layers and budgets cost: integer costs of every candidate, in parameters or operations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ArgumentError, BudgetError
from ..layers import DecomposableLayer
from ..linalg import WeightShape
from ..measurement import InputSpec, dense_flops, flops_of_ranks
from .candidates import Candidates, Curve
from .pareto import Ints

Calls = Mapping[str, Mapping[InputSpec, int]]
SHARES = {
    "params": "parameters kept",
    "flops": "floating-point operations kept",
    "latency": "the dense model's latency that is left",
}


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

    def cost(self, picks: Sequence[int]) -> int:
        """What the model costs with these candidates."""
        return self.fixed + sum(int(c[i]) for c, i in zip(self.costs, picks, strict=True))

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
    layers: Sequence[DecomposableLayer], choices: Sequence[Candidates], calls: Calls, total: int, share: float
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
    return CostTable("flops", share, tuple(costs), fixed, total, math.floor(share * total + 1e-9), "FLOPs")


def relax(table: CostTable, limit: float) -> CostTable:
    """The table with another limit, raised to the smallest that can be met."""
    return replace(table, limit=max(math.floor(limit), table.least))
