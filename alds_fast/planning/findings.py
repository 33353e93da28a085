"""What an analysis leads to: what layers need to stay within an error, plans for many budgets, and for a quality."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from ..allocation import candidates, least_error_of_pivots
from ..checks import is_count, is_number, is_share
from ..criteria import CRITERIA, DEFAULT_CRITERION, LayerSpectra, Moments
from ..errors import ArgumentError, BudgetError
from ..layers import Layer, annotate
from ..linalg import Decomposition
from ..measurement import inference
from ..progress import ProgressOption, telling
from ..text import ShownInNotebooks, shape_text, table
from .options import budget_amount
from .plan import Plan
from .plan_rows import Quality, bytes_held
from .result_check import LOST_TEXT

_LOG = logging.getLogger(__name__)

SWEPT = tuple(tenth / 10 for tenth in range(9, 0, -1))
SWEPT_BUDGETS = "params", "flops", "memory"
RESOLUTION = 1 / 200  # of the share of parameters that a quality needs
WITHIN = 0.01, 0.1  # errors of weights that an analysis tells the ranks of


class Found(NamedTuple):
    """The decomposition with the fewest parameters within an error, and the share of the weight's that it has."""

    decomposition: Decomposition
    keep: float


def fewest_within(spectra: LayerSpectra, errors: Sequence[float]) -> list[Found | None]:
    """For each relative error (Frobenius norm) of the weight, None where nothing smaller than dense is within it."""
    rule, shape = CRITERIA[DEFAULT_CRITERION].rule, spectra.layer.shape
    by_fold = {key: spectra.errors(*key, rule) for key in spectra.values}
    choices = candidates(shape, by_fold, 1, least_error_of_pivots(spectra.layer))
    costs, of_choices, results = choices.costs, choices.errors, []
    for error in errors:
        within = np.flatnonzero(of_choices <= error)
        best = int(within[np.argmin(costs[within])])
        taken = choices.decomposition(best)
        results.append(None if taken is None else Found(taken, float(costs[best]) / shape.numel))
    return results


def analysis_text(
    layers: Sequence[Layer], spectra: Mapping[str, LayerSpectra], params: int, moments: Mapping[str, Moments]
) -> str:
    """The table of an analysis of a model of so many parameters."""
    headers = ["layer", "kind", "shape", "params", "folds x groups"]
    for error in WITHIN:
        headers += [f"best within {error:.0%}", "rank", "kept"]
    rows, kept, inside = [], [0.0] * len(WITHIN), 0
    for layer in layers:
        known = spectra.get(layer.name)
        cells = [layer.name or "(model)", layer.kind, shape_text(layer.weight), f"{layer.params:,}"]
        if known is None:
            rows.append([*cells, "-", *["-"] * 3 * len(WITHIN), layer.reason or ""])
            continue
        numel = known.layer.stored
        inside += numel
        cells.append(f"{len(known.top)} x {len(known.values) // len(known.top)}")
        for i, best in enumerate(fewest_within(known, WITHIN)):
            kept[i] += numel * (best.keep if best else 1.0)
            cells += _cells(best)
        rows.append([*cells, layer.reason or ""])
    total = f"{params:,} parameters, {inside:,} of them in {len(spectra)} layers that can be factorised"
    if inside:
        shares = [f"{k / inside:.1%} within {e:.0%}" for k, e in zip(kept, WITHIN, strict=True)]
        total += f"; of these, {' and '.join(shares)} error of the weights"
    left = (0, 1, *(5 + 3 * i for i in range(len(WITHIN))), len(headers))
    lines = [table([*headers, "reason left out"], rows, left=left), total]
    if moments:
        graded = sum(of.gradient is not None for of in moments.values())
        lines.append(
            f"data: what {len(moments)} layers read, {max(of.rows for of in moments.values()):,} rows at most; "
            f"gradients at {graded}; plans go by these, the columns above by the weights"
        )
    return "\n".join(lines)


def _cells(best: Found | None) -> list[str]:
    if best is None:
        return ["dense", "full", "100.0%"]
    scheme, groups, rank, _ = best.decomposition
    return [f"scheme {scheme}, groups {groups}", str(rank), f"{best.keep:.1%}"]


@dataclass(frozen=True)
class Sweep(ShownInNotebooks):
    """Plans for many budgets of one kind, largest first; made by :meth:`alds_fast.Analysis.sweep`, printed as a table.

    Attributes:
        budget: "params", "flops" or "memory".
        plans: one for each budget that can be met.
        left_out: for each of the others why it cannot be met.
    """

    budget: str
    plans: tuple[Plan, ...]
    left_out: dict[float, str] = field(default_factory=dict)

    def kept(self, plan: Plan) -> float:
        """The share of the dense model's parameters, operations or bytes that a plan keeps."""
        return _kept(self.budget, plan)

    @property
    def knee(self) -> Plan | None:
        """The plan after which the largest error grows faster than on average for what is saved.

        Where the curve of the error over what is saved, both scaled to 0..1, is furthest below the line between its
        ends ("Kneedle", Satopaa et al. 2011); None where it is nowhere below, as where errors grow evenly.
        """
        saved = np.array([1 - self.kept(plan) for plan in self.plans])
        errors = np.array([plan.error for plan in self.plans])
        spans = np.ptp(saved), np.ptp(errors)
        if not all(spans):
            return None
        below = (saved - saved.min()) / spans[0] - (errors - errors.min()) / spans[1]
        return self.plans[int(below.argmax())] if below.max() > 0 else None

    def __repr__(self) -> str:
        missing = f", {len(self.left_out)} cannot be met" if self.left_out else ""
        return f"<Sweep of {len(self.plans)} plans by {self.budget}{missing}; print() lists them>"

    def __str__(self) -> str:
        headers, knee, rows = ["asked", "parameters", "kept", "FLOPs kept", "MB", "largest error", ""], self.knee, []
        for plan in self.plans:
            flops = plan.costs.get("flops")
            kept = f"{flops[1] / flops[0]:.2%}" if flops else "-"
            size = "-" if plan.memory is None else f"{plan.memory / 1e6:.4g}"
            cells = [plan.budget, f"{plan.params:,}", f"{plan.keep_ratio:.2%}", kept, size, f"{plan.error:.4g}"]
            rows.append([*cells, "knee" if plan is knee else ""])
        lines = [table(headers, rows, (0, 6)), *(f"left out: {text}" for text in self.left_out.values())]
        return "\n".join(lines)


def _kept(budget: str, plan: Plan) -> float:
    if budget == "params":
        return plan.keep_ratio
    before, after = (bytes_held(plan.costs) or (1, 1)) if budget == "memory" else plan.costs[budget]
    return after / before


def sweep(plan: Callable[..., Plan], budgets: Sequence[float], budget: str, options: Mapping[str, Any]) -> Sweep:
    """Plans that ``plan`` makes, each under one of the budgets; BudgetError where none can be met or one is none."""
    if budget not in SWEPT_BUDGETS:
        raise ArgumentError(f"budget={budget!r} is not one of {', '.join(SWEPT_BUDGETS)}")
    if isinstance(budgets, str) or not isinstance(budgets, Sequence) or not budgets:
        raise BudgetError(f"budgets={budgets!r}: expected a list of budgets, for example (0.7, 0.5, 0.3)")
    plans, left_out = [], {}
    for amount in budgets:
        try:
            plans.append(_trying(plan, **{budget: amount}, **options))
        except BudgetError as e:
            asked = budget_amount(amount) if budget == "memory" else amount
            if not is_share(asked) and not is_count(asked):
                raise  # it is no budget at all
            left_out[amount] = str(e)
    plans.sort(key=partial(_kept, budget), reverse=True)  # shares, numbers and texts may be mixed
    if not plans:
        raise BudgetError(next(iter(left_out.values())))
    return Sweep(budget, tuple(plans), left_out)


def smallest_of_quality(
    model: nn.Module,
    plan: Callable[..., Plan],
    build: Callable[..., nn.Module],
    evaluate: Any,
    quality: Any,
    progress: ProgressOption = None,
) -> tuple[Plan, nn.Module]:
    """The plan with the fewest parameters found whose model has at least that quality, and that model.

    ``plan(params=share)`` makes plans, ``build(plan, model)`` their models, and ``evaluate`` measures these, in
    evaluation mode. Bisection: quality need not fall with the share everywhere, so that a smaller plan may be as good.
    Every step is told and logged, and kept in ``Plan.quality``. BudgetError where the dense model is not as good.
    """
    dense = measured_quality(evaluate, model)
    _LOG.info("quality %g asked; the dense model has %g", quality, dense)
    if dense < quality:
        raise BudgetError(f"quality={quality:g} cannot be met: evaluate returns {dense:g} for the dense model")
    with telling(progress) as tell:
        low, high, best, small = 0.0, 1.0, plan(params=1.0, progress=tell), None
        steps = [(1.0, dense)]
        while high - low > RESOLUTION:
            share = (low + high) / 2
            try:
                tried = _trying(plan, params=share)
            except BudgetError as e:
                _LOG.info("quality: %s", e)
                low = share
                continue
            if tried.keep_ratio in dict(steps):  # too low, as those that were enough keep more than this share
                low = share
                continue
            made = build(tried, model, progress=False)
            steps.append((tried.keep_ratio, measured_quality(evaluate, made)))
            told = f"quality {steps[-1][1]:.6g} at {steps[-1][0]:.2%} of the parameters"
            _LOG.info(told)
            tell(told, 1, 1)
            if steps[-1][1] >= quality:
                high, best, small = tried.keep_ratio, tried, made
            else:
                low = share
    record = Quality(float(quality), dict(steps)[best.keep_ratio], dense, tuple(steps))
    best = replace(best, budget=f"quality={quality:.10g}", quality=record)
    small = build(best, model, progress=False) if small is None else small
    annotate(small, plan=replace(best, spectra={}, basis=None))
    return best, small


def _trying(plan: Callable[..., Plan], **options: Any) -> Plan:
    """The plan, untold, and without the warning that it leaves little of layers: it is one of many that are tried."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=LOST_TEXT)
        return plan(**{"progress": False, **options})


def measured_quality(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    """What ``evaluate`` returns for the model in evaluation mode; ArgumentError for anything but a finite number."""
    with inference(model):
        value = evaluate(model)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not is_number(value) or not math.isfinite(value):
        raise ArgumentError(f"evaluate returned {value!r}: expected a finite number, higher is better")
    return float(value)
