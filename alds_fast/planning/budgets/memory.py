"""Plans under a budget on memory that activations count to: their peak is measured, and weights get what it leaves.

The peak of a compressed model is not that of the dense one: low-rank layers also hold what is between their factors,
and hidden units may be fewer. So plans are made, run with random factors and measured, in two ways. One lets the peak
be what it is, and closes in on the weights that it leaves. The other does so with those layers dense during whose calls
more is held than at the dense model's peak, which is the better plan where activations are most of the memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from ...allocation import BASELINES, MAX_LATENCY_GROUPS, Calls, p_norm, random_model
from ...errors import BudgetError
from ...linalg import Decomposition
from ...measurement import Peak, count_inputs, peak_of_activations
from ...progress import ProgressOption
from .latency import solve_once
from .problem import PlanOutcome, PlanProblem

MOST_PLANS = 10  # that are measured in either way
UNSPENT = 1 / 200  # of the budget that may be left over
_LOG = logging.getLogger(__name__)


def seen_in_runs(
    model: nn.Module, example_inputs: Any, names: Sequence[str], memory: bool
) -> tuple[tuple[Calls, int] | None, tuple[int, int] | None]:
    """``counted`` of a problem and, if there is a budget on memory, its ``activations``: all None without inputs."""
    if example_inputs is None:
        return None, None
    counted = count_inputs(model, example_inputs, names)
    if not memory:
        return counted, None
    peak = peak_of_activations(model, example_inputs).whole
    return counted, (peak, peak)


def solve_shares(
    problem: PlanProblem,
    asked: Mapping[str, float | None],
    example_inputs: Any,
    p: float,
    cache: str | os.PathLike[str] | bool | None,
    progress: ProgressOption,
) -> PlanOutcome:
    """Least p-norm of the errors within all that is asked for, of "params", "flops", "memory" and "latency".

    Raises BudgetError where they cannot be met and ModelError where the model does not run; warns where the latency
    measured in the end is not within 10 % of the one asked for.
    """
    if asked["latency"] is not None:
        problem = replace(problem, choices=[c.few_groups(MAX_LATENCY_GROUPS) for c in problem.choices])
    if asked["memory"] is None or problem.activations is None:
        return solve_once(problem, asked, example_inputs, p, cache, progress)
    search = _Search(problem, asked, example_inputs, p, cache, progress)
    best = search.closing_in()
    if problem.method in BASELINES or (best is not None and _bytes(best)[1] <= search.dense):
        other = None
    else:
        other = search.near_the_dense_peak()
    if best is None and other is None:
        raise search.refusal()
    return min((outcome for outcome in (best, other) if outcome is not None), key=search.norm)


@dataclass
class _Search:
    """Plans of weights within some bytes, and the peaks of their runs."""

    problem: PlanProblem
    asked: Mapping[str, float | None]
    example_inputs: Any
    p: float
    cache: str | os.PathLike[str] | bool | None
    progress: ProgressOption
    _peaks: dict[frozenset[tuple[str, Decomposition]], Peak] = field(default_factory=dict)
    _refused: BudgetError | None = None
    _least: PlanOutcome | None = None

    def __post_init__(self) -> None:
        assert self.problem.activations is not None
        self.dense = self.problem.activations[0]
        (self.table,) = self.problem.tables({"memory": self.asked["memory"]})
        self.limit = self.table.limit
        self._peaks[frozenset()] = Peak(self.dense, {})

    def plan(self, weights: int, kept: frozenset[str] = frozenset()) -> PlanOutcome | None:
        """The plan with at most these bytes of weights, the layers ``kept`` dense, measured; None if there is none."""
        problem = replace(self.problem, activations=(self.dense, self.limit - weights), kept_dense=kept)
        try:
            outcome = solve_once(problem, self.asked, self.example_inputs, self.p, self.cache, self.progress)
        except BudgetError as e:
            self._refused = e
            return None
        peak = self.peak(outcome)
        outcome = replace(outcome, costs={**outcome.costs, "activations": (self.dense, peak.whole)})
        _LOG.info("memory: %d bytes of weights and %d of activations, %d asked", *_bytes(outcome), self.limit)
        if self._least is None or sum(_bytes(outcome)) < sum(_bytes(self._least)):
            self._least = outcome
        return outcome

    def peak(self, outcome: PlanOutcome) -> Peak:
        """What a run of the plan's model holds at most, and in calls of the layers that it replaces."""
        replaced = replace(self.problem, choices=outcome.choices).replaced(outcome.solution.picks)
        key = frozenset(replaced.items())
        if key not in self._peaks:
            small = random_model(self.problem.model, replaced)
            self._peaks[key] = peak_of_activations(small, self.example_inputs, replaced)
        return self._peaks[key]

    def closing_in(self, kept: frozenset[str] = frozenset()) -> PlanOutcome | None:
        """The plan of the most weights found that are within the budget together with their own peak."""
        least, high = self.least_weights(kept), self.table.total - self.dense + 1  # too many, as far as is known
        best, low = None, least
        weights = min(max(self.limit - self.dense, low), high - 1)
        for done in range(MOST_PLANS):
            outcome = self.plan(weights, kept)
            if outcome is None:
                break
            left = self.limit - _bytes(outcome)[1]
            fits = _bytes(outcome)[0] <= left
            if fits:
                best, low = outcome, weights
            elif weights == least:
                break
            else:
                high = weights
            most = min(left, high - 1) if fits else high - 1  # what a plan that does not fit leaves is of its own peak
            if best is not None and most - low <= UNSPENT * self.limit:
                break
            if best is None and (left <= least or done == MOST_PLANS - 2):
                weights = least
            else:
                weights = left if low < left < high else (low + high) // 2
        return best

    def near_the_dense_peak(self) -> PlanOutcome | None:
        """The same of plans that keep those layers dense in whose calls more than the dense model's peak is held."""
        kept = frozenset[str]()
        for _ in range(MOST_PLANS):
            outcome = self.plan(max(self.limit - self.dense, self.least_weights(kept)), kept)
            if outcome is None:
                return None
            above = {name for name, held in self.peak(outcome).of_layers.items() if held > self.dense}
            if not above:
                break
            kept |= above
        return self.closing_in(kept) if kept else None

    def least_weights(self, kept: frozenset[str]) -> int:
        """The fewest bytes of weights, the layers ``kept`` dense."""
        (table,) = replace(self.problem, kept_dense=kept).tables({"memory": self.asked["memory"]})
        return table.least - self.dense

    def norm(self, outcome: PlanOutcome) -> float:
        """What the plan is to have least of."""
        errors = [float(c.errors[i]) for c, i in zip(outcome.choices, outcome.solution.picks, strict=True)]
        return p_norm(np.array(errors), self.p)

    def refusal(self) -> BudgetError:
        """Why no plan is within the budget, and the least that was found."""
        self.plan(self.table.total - self.dense)  # nothing replaced, which may hold less in a run
        if self._least is None:
            assert self._refused is not None
            return self._refused
        sizes, amount = _bytes(self._least), self.table.amount
        weights, peak = map(amount, sizes)
        alone = "; activations alone are more than asked: give inputs of fewer samples" if sizes[1] > self.limit else ""
        return BudgetError(
            f"{self.table.text}, {amount(self.limit)} MB, cannot be met: the smallest found is "
            f"{self.table.text_of(sum(sizes))}, weights of {weights} MB + activations of {peak} MB, the peak of a run "
            f"with example_inputs= as measured{alone}"
        )


def _bytes(outcome: PlanOutcome) -> tuple[int, int]:
    """Those of weights, and of activations at the peak."""
    return outcome.costs["memory"][1], outcome.costs["activations"][1]
