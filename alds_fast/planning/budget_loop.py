"""Plans under shares of parameters, operations and latency; the latency is measured and, if it is off, mended."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..allocation import (
    BASELINES,
    MAX_LATENCY_GROUPS,
    Calls,
    Candidates,
    CostTable,
    Front,
    Ints,
    LayerTimes,
    Solution,
    allocate,
    corrected_limit,
    curves_in_doubt,
    end_to_end,
    flops_table,
    largest_error,
    memory_table,
    params_table,
    relax,
    solve,
    solve_baseline,
    solve_error,
)
from ..criteria import Basis, Errors, Key, LayerSpectra, layer_errors
from ..errors import BudgetError
from ..layers import DecomposableLayer, label
from ..measurement import Timings, device_name, device_of
from ..processes import World
from ..progress import ProgressOption, telling
from .plan_rows import Latency

MAX_REFINEMENTS = 4
_LOG = logging.getLogger(__name__)


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
    calls of layers and the operations in a run of it, None without example inputs.
    """

    model: nn.Module
    params: int
    memory: int
    counted: tuple[Calls, int] | None
    layers: Sequence[DecomposableLayer]
    choices: Sequence[Candidates]
    spectra: Sequence[LayerSpectra] = ()
    method: str = "alds"

    def tables(self, asked: Mapping[str, float | None]) -> list[CostTable]:
        """The budgets that are counted, of "params", "flops" and "memory"."""
        params, flops, memory = (asked.get(name) for name in ("params", "flops", "memory"))
        tables = [] if params is None else [params_table(self.choices, self.params, params)]
        if flops is not None and self.counted is not None:
            tables.append(flops_table(self.layers, self.choices, *self.counted, flops))
        if memory is not None:
            tables.append(memory_table(self.layers, self.choices, self.memory, memory))
        return tables

    def costs(self, picks: Sequence[int]) -> dict[str, tuple[int, int]]:
        """What the model costs before and after, by name: "memory" and, if they were counted, "flops"."""
        counted = self.counted is not None and self.counted[1] > 0
        tables = self.tables({"flops": 1.0 if counted else None, "memory": 1.0})
        return {t.name: (t.total, t.cost(picks)) for t in tables}

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


def solve_shares(
    problem: PlanProblem,
    asked: Mapping[str, float | None],
    example_inputs: Any,
    p: float,
    cache: str | os.PathLike[str] | bool | None,
) -> PlanOutcome:
    """Least p-norm of the errors within all that is asked for, of "params", "flops", "memory" and "latency".

    Raises BudgetError where they cannot be met and ModelError where the model does not run; warns where the latency
    measured in the end is not within 10 % of the one asked for.
    """
    latency = asked["latency"]
    if latency is not None:
        few = [c.few_groups(MAX_LATENCY_GROUPS) for c in problem.choices]
        problem = replace(problem, choices=few)
    tables, layers = problem.tables(asked), problem.layers
    if latency is None:
        return problem.outcome(problem.solve(tables, p), tables)
    if not layers and latency < 1:
        raise BudgetError(f"latency={latency:g} cannot be met: the smallest reachable is latency=1")
    device = device_of(problem.model)
    assert problem.counted is not None  # as latency= needs example inputs
    calls, timings = problem.counted[0], Timings(device, cache)
    times = LayerTimes(problem.model, example_inputs, layers, problem.choices, calls, timings, device)
    return _solve_within_latency(problem, tables, times, float(latency), example_inputs, p, device)


def _measure(
    problem: PlanProblem, picks: Sequence[int], share: float, example_inputs: Any, device: torch.device, attempt: int
) -> Latency:
    taken = [c.decomposition(i) for c, i in zip(problem.choices, picks, strict=True)]
    replaced = {layer.name: d for layer, d in zip(problem.layers, taken, strict=True) if d is not None}
    ratio, dense_ms, small_ms = end_to_end(problem.model, replaced, example_inputs, device)
    return Latency(share, ratio, dense_ms, small_ms, device_name(device), attempt)


def _solve_within_latency(
    problem: PlanProblem,
    tables: Sequence[CostTable],
    times: LayerTimes,
    share: float,
    example_inputs: Any,
    p: float,
    device: torch.device,
) -> PlanOutcome:
    """Solve, measure, and where that is off look closer and correct the limit by how far predictions are off.

    The outcome whose measured latency is nearest to the one asked for is kept. A share below the smallest prediction is
    tried too; BudgetError where what is measured is above it as well.
    """
    outcomes: list[PlanOutcome] = []
    table = times.table(share)
    doubtful = table.least > (1 + Latency.TOLERANCE) * table.limit
    table = relax(table, table.limit)
    for attempt in range(MAX_REFINEMENTS + 1):
        try:
            solution = problem.solve([*tables, table], p)
        except BudgetError:
            if not outcomes:
                raise
            break  # the corrected limit cannot be met together with the other budgets
        latency = _measure(problem, solution.picks, share, example_inputs, device, attempt)
        _LOG.info("latency: %s", latency)
        outcomes.append(problem.outcome(solution, [*tables, table], latency))
        if _is_settled(outcomes, tables):
            break
        times.look_closer(solution.picks)
        table = times.table(share)
        measured = [(o.solution.picks, o.latency.measured) for o in outcomes if o.latency is not None]
        table = relax(table, corrected_limit(table, measured))
    times.warn_if_unsteady()
    best = min(outcomes, key=_distance)
    _check_measured(best, tables, doubtful and all(o.latency.measured > share for o in outcomes if o.latency))
    return best


def _distance(outcome: PlanOutcome) -> float:
    assert outcome.latency is not None
    return outcome.latency.distance


def _free(outcome: PlanOutcome, tables: Sequence[CostTable]) -> bool:
    """Whether less latency than asked for is no loss: nothing is left to win, or other budgets hold it down."""
    assert outcome.latency is not None
    exact = largest_error(outcome.choices, outcome.solution.picks) == 0.0
    return outcome.latency.measured < outcome.latency.asked and (exact or bool(tables))


def _is_settled(outcomes: Sequence[PlanOutcome], tables: Sequence[CostTable]) -> bool:
    """Within the tolerance; or nothing else can be done, the same choice having come out before."""
    last = outcomes[-1]
    seen = [o.solution.picks for o in outcomes[:-1]]
    return _distance(last) <= Latency.TOLERANCE or last.solution.picks in seen or _free(last, tables)


def _check_measured(outcome: PlanOutcome, tables: Sequence[CostTable], refused: bool) -> None:
    """A UserWarning where the latency is off, or a BudgetError."""
    latency = outcome.latency
    assert latency is not None
    if latency.distance <= Latency.TOLERANCE or _free(outcome, tables):
        return
    if refused:
        reach = math.ceil(1000 * latency.measured) / 1000
        raise BudgetError(
            f"latency={latency.asked:g} cannot be met: the smallest reachable is latency={reach:g}, measured: "
            f"{latency.dense_ms:.3g} -> {latency.compressed_ms:.3g} ms"
        )
    warnings.warn(
        f"the plan was not brought within {Latency.TOLERANCE:.0%} of the latency asked for: {latency}", stacklevel=3
    )
