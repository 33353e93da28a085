"""Analyse a model once, then plan for any budget."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Never

from torch import nn

from ..allocation import BASELINES, amount_text, dense_reason, with_exact_values
from ..criteria import (
    DEFAULT_CRITERION,
    Basis,
    Errors,
    Key,
    LayerSpectra,
    Moments,
    Recompute,
    exact_spectra,
    with_outputs,
)
from ..layers import DecomposableLayer, Layer, count_bytes, decomposable, left_out_text, saying_what_is_left_out
from ..processes import World
from ..progress import ProgressOption
from ..text import ShownInNotebooks
from .budgets import PlanProblem, errors_of_layers, seen_in_runs, solve_shares
from .findings import SWEPT, Sweep, analysis_text, smallest_of_quality, sweep
from .options import (
    budget_amount,
    check_is_possible,
    check_plan_options,
    check_quality,
    choices_of,
    importance_of_layers,
    keeps_constants,
    pins_of_layers,
    read_pins,
    refuse_unknown,
    resolved_criterion,
    resolved_norm,
    saying_what_is_pinned,
    tell_too_little,
)
from .plan import Plan
from .plan_rows import plan_rows
from .result_check import warn_of_plan
from .widths import WidthSearch


@dataclass(frozen=True)
class Analysis(ShownInNotebooks):
    """The spectra of a model's layers; made by :func:`alds_fast.analyze`.

    Attributes:
        layers: every layer with a weight of two or more dimensions, with the reason if it is left out.
        spectra: by layer name, for those that are not.
        params: parameters of the model, shared ones once.
        model: the model itself, which budgets on operations and latency run.
        moments: by layer name, what the layers called with ``data`` see; empty without.
        max_groups: most channel slices tried with data, where those of large matrices are not; None for no limit.
        recompute_in_float64: computes the spectra of some (layer, (scheme, groups)) in float64.
        world: the processes that plan together, each of which computes some layers' errors.
        inputs: what the model was run with, the first batch of ``data`` or example inputs; None without any.
    """

    layers: tuple[Layer, ...]
    spectra: dict[str, LayerSpectra]
    params: int
    model: nn.Module = field(repr=False, compare=False)
    moments: dict[str, Moments] = field(default_factory=dict, repr=False, compare=False)
    max_groups: int | None = None
    recompute_in_float64: Recompute = field(default=exact_spectra, repr=False)
    world: World = field(default_factory=World, repr=False, compare=False)
    inputs: Any = field(default=None, repr=False, compare=False)
    _errors: dict[tuple[str, bool, bool], list[Errors]] = field(default_factory=dict, repr=False, compare=False)
    _bases: dict[tuple[str, bool], Basis] = field(default_factory=dict, repr=False, compare=False)
    _widths: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def plan(
        self,
        *,
        params: float | None = None,
        flops: float | None = None,
        memory: float | str | None = None,
        latency: float | None = None,
        error: float | None = None,
        quality: float | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        example_inputs: Any = None,
        criterion: str | None = None,
        p: float | None = None,
        method: str = "alds",
        align: int = 1,
        bias_correction: bool = True,
        importance: Mapping[Any, float] | None = None,
        cache: str | os.PathLike[str] | bool | None = None,
        pivots: bool = True,
        pins: Mapping[Any, Any] | None = None,
        min_rank: int = 1,
        hidden_units: bool = False,
        progress: ProgressOption = None,
        **unknown: Never,
    ) -> Plan:
        """Choose (scheme, groups, rank), or dense, for every layer.

        The least p-norm of the layers' errors within one budget or all of several:

        Args:
            params: share of the whole model's parameters to keep, in (0, 1], or their number, an integer above 1.
            flops: the same of the floating-point operations of one run of the whole model, as
                ``torch.utils.flop_counter`` counts them.
            memory: the same of the bytes of parameters and buffers and, with ``example_inputs``, of a run's activations
                at their peak, measured; also a text like "20MB" (10^6 bytes) or "20MiB".
            latency: share of the dense model's latency to keep, in (0, 1], on the device where model and inputs are;
                measured, see :mod:`alds_fast.allocation.latency`. More than 8 channel slices are not tried under it.
            error: largest relative error allowed, >= 0; the fewest parameters within it. Alone.
            quality, evaluate: the least that ``evaluate(small)``, of the model in evaluation mode, may be; the fewest
                parameters found with that, by bisection, every step of which is in ``Plan.quality``. Alone.
            example_inputs: what the model is run with for flops= and latency=, and where operations are to be counted
                and activations to count: a tensor, a tuple or list of positional arguments, or a dict of keyword ones.
            criterion: "frobenius" (exact), "operator", "paper" (upper bounds) or "reference", see
                :mod:`alds_fast.criteria.spectral`; with data "output" (exact error of the layer's output on the data,
                relative to that output), "output-bound" (an upper bound of it) or, with gradients, "sensitivity" (what
                that error does to the network's output, to first order), see
                :mod:`alds_fast.criteria.weighted_errors`. None for the best that the analysis allows: "sensitivity",
                "output", "frobenius".
            p: how layers are traded, 1 <= p <= inf; inf minimises the largest error, then, under one budget, the second
                largest, ...; exactly under one budget. How far from the optimum is in ``Plan.gap``. None for 2 with
                "sensitivity", whose squares add up, and where layers are compared on samples kept aside, as errors of
                calibration are not near those; 4 with other criteria, which measured best, and inf with error=.
            method: "alds" (exact) or, for comparison, "alds-heuristic" (the paper's alternating search), "svd",
                "svd-energy", "svd-nuclear", "l-rank", "pca", "sum" or "uniform", see
                :mod:`alds_fast.allocation.baselines`: under one budget, of params= or flops=. Their ``Plan.gap`` is
                that of the largest error.
            align: ranks are multiples of it.
            bias_correction: with data, a layer's own bias takes up the error's mean; without, ``Plan.keeps_constants``.
            importance: by name, pattern or class of layers, as for ``exclude`` of :func:`alds_fast.analyze`, factors
                >= 0 of the errors; 1 for those not named, of several patterns the last.
            pivots: try factors without an identity too, smaller at the same rank (:mod:`alds_fast.linalg.pivots`); in
                half types for errors of 5 % and more, as they round more coarsely. Baselines have plain factors.
            pins: by name, pattern or class of layers, "dense" or a dict of "min_rank", "max_rank", "min_keep" and
                "max_keep" (shares of the weight): what the layer may become. A dense layer has full rank and keeps 1.
                All pins of a layer hold; with a baseline there is "dense" only.
            min_rank: least rank of the slices of every layer that does not stay dense.
            hidden_units: also remove hidden units of MLPs where that loses less than ranks do, see
                :mod:`alds_fast.planning.widths.search`; with gradients, under params=, flops= or memory= alone.
            progress: as for :func:`alds_fast.analyze`.
            cache: folder where timings are kept between calls; None for ``$ALDS_FAST_CACHE`` or
                ``~/.cache/alds_fast``, False for none.

        Spectra that were computed in float32 (``analyze(precision="float32")``) are computed again in float64, and
        kept, for those in doubt (:mod:`alds_fast.allocation.float32_check`), so that the plan is that of float64 but
        for ties in its own rounding; for all unless the budget is one of params= or flops=, the criterion "frobenius",
        the method "alds".

        Warns:
            UserWarning: the latency measured in the end is not within 10 % of the one asked for (``Plan.latency``);
                errors on samples kept aside are more than 1.5 times those stated; ``data=`` told too little to be used;
                no layer can be decomposed; errors above .9 leave next to nothing of one; ``error=`` bounds nothing.

        Raises:
            BudgetError: no budget, two that exclude each other, out of range, or smaller than the smallest reachable.
            LayerNotFoundError: a key of importance= or pins= means no layer.
            ArgumentError: another argument is out of range; pins contradict each other, or leave a layer no choice.
            ModelError: the model does not run with the example inputs, or has changed since its spectra were computed
                in float32.
        """
        refuse_unknown(unknown, self.plan)
        shares: dict[str, Any] = {"params": params, "flops": flops, "memory": memory, "latency": latency}
        options: dict[str, Any] = {"criterion": criterion, "p": p, "method": method, "align": align, "cache": cache}
        options |= {"bias_correction": bias_correction, "importance": importance, "pivots": pivots}
        options |= {"pins": pins, "min_rank": min_rank, "hidden_units": hidden_units}
        if check_quality(quality, evaluate, {**shares, "error": error}):
            plans = partial(self.plan, **options, example_inputs=example_inputs)
            return smallest_of_quality(self.model, plans, Plan.apply, evaluate, quality, progress)[0]
        check_plan_options(shares, error, example_inputs, **options)
        asked = {name: None if amount is None else budget_amount(amount) for name, amount in shares.items()}
        layers = decomposable(self.layers)
        basis = self._basis(resolved_criterion(criterion, self.moments, method), bias_correction)
        if self.world.size > 1:
            basis.of_all(layers, self.world, basis.look_at)
        if criterion is None and method not in BASELINES and tell_too_little(basis, layers, hidden_units):
            basis = self._basis(DEFAULT_CRITERION, bias_correction)
        few = error is None and method not in BASELINES and basis.used and basis.goes_by_samples_kept_aside(layers)
        p = resolved_norm(p, basis.criterion, shares, method, few)
        weights = importance_of_layers(importance, self.model, self.layers)
        pinned = pins_of_layers(pins, min_rank, self.model, self.layers)
        if not check_is_possible([k for k, share in shares.items() if share is not None], basis.criterion, method):
            self._recompute([(name, key) for name, s in self.spectra.items() for key in sorted(s.float32)])
        seen = seen_in_runs(self.model, example_inputs, [layer.name for layer in layers], memory is not None)
        sizes = self.params, count_bytes(self.model), *seen
        if hidden_units:
            search = WidthSearch(self, basis, few, weights, pinned, int(align), pivots, asked, example_inputs, *seen)
            return search.plan({**options, "p": p, "criterion": basis.criterion}, progress)
        while True:
            errors, pivoted = self._errors_of(layers, basis, few, progress), pivots and method not in BASELINES
            choices = choices_of(layers, errors, weights, align, pivoted, pinned)
            spectra = [self.spectra[layer.name] for layer in layers]
            if method in BASELINES and BASELINES[method].needs_data:
                spectra = [with_outputs(s, basis.weighting(s.layer, for_errors=True)) for s in spectra]
            problem = PlanProblem(self.model, *sizes, layers, choices, spectra, method)
            with saying_what_is_left_out(self.layers), saying_what_is_pinned(read_pins(pins), min_rank):
                if error is not None:
                    outcome = problem.within(float(error))
                    break
                outcome = solve_shares(problem, asked, example_inputs, p, cache, progress)
            if not (doubt := problem.doubt(outcome, list(weights.values()), p)):
                break
            self._recompute(doubt)
        if not layers:
            warnings.warn(f"no layer can be decomposed: {left_out_text(self.layers)}", stacklevel=2)
        picks = enumerate(zip(layers, outcome.choices, outcome.solution.picks, strict=True))
        chosen = {layer.name: (c, taken, dense_reason(outcome.tables, i)) for i, (layer, c, taken) in picks}
        rows = plan_rows(self.layers, chosen, align, pinned, basis, weights)
        warn_of_plan(rows, basis.criterion, weights, error, chosen)
        budget = ", ".join(f"{k}={amount_text(v)}" for k, v in asked.items() if v is not None) or f"error={error:g}"
        made = basis.criterion, method, float(p), int(align), outcome.solution.gap, outcome.latency
        held = basis.bias_correction, keeps_constants(basis, method, error), read_pins(pins), int(min_rank)
        kept = {r.name: self.spectra[r.name].values[r.choice.decomposition.fold] for r in rows if r.choice}
        return Plan(rows, self.params, budget, *made, *held, outcome.costs, spectra=kept, basis=basis)

    def sweep(self, budgets: Sequence[float] = SWEPT, *, budget: str = "params", **options: Any) -> Sweep:
        """Plans for many budgets of one kind, "params", "flops" or "memory", from this one analysis.

        ``options`` are those of :meth:`plan`. Budgets that cannot be met are named in ``Sweep.left_out``; BudgetError
        if none can be met.
        """
        return sweep(self.plan, budgets, budget, options)

    def _basis(self, criterion: str, bias_correction: bool) -> Basis:
        """What errors are measured by, kept for the next plan."""
        return self._bases.setdefault((criterion, bias_correction), Basis(criterion, self.moments, bias_correction))

    def _recompute(self, wanted: Sequence[tuple[str, Key]]) -> None:
        """These spectra in float64, in the place of those there are; without any, known errors stay."""
        if not wanted:
            return
        for layer, key, values in self.recompute_in_float64([(self.spectra[name].layer, key) for name, key in wanted]):
            self.spectra[layer.name] = with_exact_values(self.spectra[layer.name], key, values)
        self._errors.clear()

    def _errors_of(
        self, layers: Sequence[DecomposableLayer], basis: Basis, held_out: bool, progress: ProgressOption = False
    ) -> list[Errors]:
        """The layers' errors by rank, kept for the next plan; ``held_out``: on samples kept aside if there are."""
        key = basis.criterion, basis.bias_correction, held_out
        if key not in self._errors:
            spectra = [self.spectra[layer.name] for layer in layers]
            self._errors[key] = errors_of_layers(spectra, basis, self.max_groups, held_out, self.world, progress)
        return self._errors[key]

    def __repr__(self) -> str:
        return f"<Analysis of {len(self.layers)} layers, {len(self.spectra)} can be factorised; print() lists them>"

    def __str__(self) -> str:
        return analysis_text(self.layers, self.spectra, self.params, self.moments)
