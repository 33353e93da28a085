"""What a plan has to solve: candidates, what they cost under every counted budget, and the solution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from ...allocation import (
    BASELINES,
    Calls,
    Candidates,
    CostTable,
    Front,
    Ints,
    Solution,
    allocate,
    curves_in_doubt,
    flops_table,
    memory_table,
    params_table,
    solve,
    solve_baseline,
    solve_error,
)
from ...criteria import Basis, Errors, Key, LayerSpectra, layer_errors
from ...errors import BudgetError
from ...layers import DecomposableLayer, label
from ...linalg import Decomposition
from ...processes import World
from ...progress import ProgressOption, telling
from ..plan_rows import Latency


def errors_of_layers(
    spectra: Sequence[LayerSpectra], basis: Basis, max_groups: int | None, held_out: bool, world: World,
    progress: ProgressOption,
) -> list[Errors]:  # fmt: skip
    """The layers' errors by rank, each computed by one of the processes."""
    known, done = {one.layer.name: one for one in spectra}, 0
    with telling(progress) as tell:

        def find(layer: DecomposableLayer) -> Errors:
            nonlocal done
            errors, done = layer_errors(known[layer.name], basis, max_groups, held_out), min(done + 1, len(spectra))
            tell("errors by rank", done, len(spectra))
            return errors

        return basis.of_all([one.layer for one in spectra], world, find)


@dataclass(frozen=True)
class PlanProblem:
    """A model, and the layers of it that can be factorised with their candidates.

    ``params`` and ``memory`` are what the model has of parameters, and of bytes of these and buffers; ``counted`` the
    calls of layers and the operations in a run of it, None without example inputs. ``activations`` count under a budget
    on memory, None for weights alone: bytes that a run of the model has at its peak, and of the compressed one, as
    assumed. Layers ``kept_dense`` have no other form within a budget on memory.
    """

    model: nn.Module
    params: int
    memory: int
    counted: tuple[Calls, int] | None
    activations: tuple[int, int] | None
    layers: Sequence[DecomposableLayer]
    choices: Sequence[Candidates]
    spectra: Sequence[LayerSpectra] = ()
    method: str = "alds"
    kept_dense: frozenset[str] = frozenset()

    def tables(self, asked: Mapping[str, float | None]) -> list[CostTable]:
        """The budgets that are counted, of "params", "flops" and "memory"."""
        params, flops, memory = (asked.get(name) for name in ("params", "flops", "memory"))
        tables = [] if params is None else [params_table(self.choices, self.params, params)]
        if flops is not None and self.counted is not None:
            tables.append(flops_table(self.layers, self.choices, *self.counted, flops))
        if memory is not None:
            table = memory_table(self.layers, self.choices, self.memory, memory, self.activations or (0, 0))
            costs, beyond = list(table.costs), max(table.limit, table.total) + 1
            for i, (layer, choice) in enumerate(zip(self.layers, self.choices, strict=True)):
                if layer.name in self.kept_dense and choice.may_stay_dense:
                    costs[i] = np.append(np.full_like(costs[i][:-1], beyond), costs[i][-1])
            tables.append(replace(table, costs=tuple(costs)))
        return tables

    def costs(self, picks: Sequence[int]) -> dict[str, tuple[int, int]]:
        """What the model costs before and after, by name: "memory" of weights and, if they were counted, "flops"."""
        counted = self.counted is not None and self.counted[1] > 0
        alone = replace(self, activations=None, kept_dense=frozenset())
        tables = alone.tables({"flops": 1.0 if counted else None, "memory": 1.0})
        return {t.name: (t.total, t.cost(picks)) for t in tables}

    def replaced(self, picks: Sequence[int]) -> dict[str, Decomposition]:
        """By name of a layer what replaces it."""
        taken = [choice.decomposition(i) for choice, i in zip(self.choices, picks, strict=True)]
        return {layer.name: d for layer, d in zip(self.layers, taken, strict=True) if d is not None}

    def solve(self, tables: Sequence[CostTable], p: float) -> Solution:
        """By the method: exactly under any budgets, a baseline under one."""
        if self.method in BASELINES:
            (table,) = tables
            return solve_baseline(self.method, self.choices, table, self.spectra)
        return solve(self.choices, tables, p)

    def within(self, error: float) -> PlanOutcome:
        """The fewest parameters with errors of at most ``error``; BudgetError where pins allow none so small."""
        least = {layer.name: float(c.errors.min()) for layer, c in zip(self.layers, self.choices, strict=True)}
        worst = max(least, key=lambda name: least[name], default="")
        if least and least[worst] > error:
            reach = f"{1.0005 * least[worst]:.4g}"  # rounded, not less
            raise BudgetError(
                f"error={error:g} cannot be met: the smallest reachable is error={reach}, that of layer {label(worst)}"
            )
        table = params_table(self.choices, self.params, 1.0)
        return self.outcome(solve_error(self.choices, error), [table])

    def outcome(self, solution: Solution, tables: Sequence[CostTable], latency: Latency | None = None) -> PlanOutcome:
        """The solution as an outcome."""
        return PlanOutcome(self.choices, solution, tables, self.costs(solution.picks), latency)

    def doubt(self, outcome: PlanOutcome, weights: Sequence[float], p: float) -> list[tuple[str, Key]]:
        """The float32 spectra, by layer, errors times ``weights``, that might not decide as float64 ones."""
        if not any(s.float32 for s in self.spectra):
            return []
        (table,), picks = outcome.tables, outcome.solution.picks

        def best_picks(fronts: Sequence[Front]) -> Ints:
            return allocate(fronts, table.budget(), p).picks

        return curves_in_doubt(self.spectra, outcome.choices, weights, picks, table.costs, best_picks)


@dataclass(frozen=True)
class PlanOutcome:
    """The solution in terms of ``choices``, the budgets' costs, and the latency where there is a budget on it.

    ``costs``: what the model costs before and after, by name, as :meth:`PlanProblem.costs` has it.
    """

    choices: Sequence[Candidates]
    solution: Solution
    tables: Sequence[CostTable]
    costs: dict[str, tuple[int, int]]
    latency: Latency | None = None
