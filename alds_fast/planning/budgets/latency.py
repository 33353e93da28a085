"""Plans under a budget on latency: it is measured and, if it is off, mended."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...allocation import CostTable, LayerTimes, corrected_limit, end_to_end, largest_error, relax
from ...errors import BudgetError
from ...measurement import Timings, device_name, device_of
from ...progress import ProgressOption, telling
from ..plan_rows import Latency
from .problem import PlanOutcome, PlanProblem

MAX_REFINEMENTS = 4
_LOG = logging.getLogger(__name__)


def solve_once(
    problem: PlanProblem,
    asked: Mapping[str, float | None],
    example_inputs: Any,
    p: float,
    cache: str | os.PathLike[str] | bool | None,
    progress: ProgressOption,
) -> PlanOutcome:
    """Least p-norm of the errors within all that is asked for, with the activations that the problem assumes.

    BudgetError where it cannot be met, or not even half of what was to be saved is; warns where the latency measured
    in the end is not within 10 % of it, and instead of an error where its rounds are far apart.
    """
    latency = asked["latency"]
    tables, layers = problem.tables(asked), problem.layers
    if latency is None:
        return problem.outcome(problem.solve(tables, p), tables)
    if not layers and latency < 1:
        raise BudgetError(f"latency={latency:g} cannot be met: the smallest reachable is latency=1")
    device = device_of(problem.model)
    assert problem.counted is not None  # as latency= needs example inputs
    calls, timings = problem.counted[0], Timings(device, cache)
    with telling(progress) as tell:
        times = LayerTimes(problem.model, example_inputs, layers, problem.choices, calls, timings, device, tell)
        return _solve_within_latency(problem, tables, times, float(latency), example_inputs, p, device)


def _measure(
    problem: PlanProblem, picks: Sequence[int], share: float, example_inputs: Any, device: torch.device, attempt: int
) -> Latency:
    replaced = problem.replaced(picks)
    ratio, spread, dense_ms, small_ms = end_to_end(problem.model, replaced, example_inputs, device)
    if not replaced:  # the same model twice: how far the two are apart is noise
        ratio, small_ms = 1.0, dense_ms
    return Latency(share, ratio, dense_ms, small_ms, device_name(device), attempt, spread)


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

    The outcome whose measured latency is nearest to the one asked for is kept; the dense model, which corrected limits
    may lead to, only where nothing else was tried. A share below the smallest prediction is tried too; BudgetError
    where what is measured is above it as well.
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
    best = min(outcomes, key=lambda outcome: (not problem.replaced(outcome.solution.picks), _distance(outcome)))
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
    assert last.latency is not None
    return last.latency.is_met or last.solution.picks in seen or _free(last, tables)


def _check_measured(outcome: PlanOutcome, tables: Sequence[CostTable], refused: bool) -> None:
    """A UserWarning where the latency is off, or a BudgetError, for which rounds that are far apart are no reason."""
    latency = outcome.latency
    assert latency is not None
    if latency.is_met or _free(outcome, tables):
        return
    if not latency.saves_half and latency.steady:
        raise BudgetError(
            f"latency={latency.asked:g} cannot be met: of the plans that were tried the nearest takes "
            f"{latency.measured:.2f} of the dense model's time, measured: {latency.dense_ms:.3g} -> "
            f"{latency.compressed_ms:.3g} ms; low-rank layers as small as these, or as small a part of the time, do "
            f"not run faster here: try larger batches or another device, or give a budget that no time decides "
            f"(params=, flops=, memory=)"
        )
    if refused and latency.steady:
        reach = math.ceil(1000 * latency.measured) / 1000
        raise BudgetError(
            f"latency={latency.asked:g} cannot be met: the smallest reachable is latency={reach:g}, measured: "
            f"{latency.dense_ms:.3g} -> {latency.compressed_ms:.3g} ms"
        )
    busy = "" if latency.steady else ". The machine is busy: on a quiet one this is worth another try"
    warnings.warn(
        f"the plan was not brought within {Latency.TOLERANCE:.0%} of the latency asked for: {latency}{busy}",
        stacklevel=3,
    )
