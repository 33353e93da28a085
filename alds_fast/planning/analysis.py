"""Analyse a model once, then plan for any budget."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..allocation import (
    BASELINES,
    Candidates,
    candidates,
    dense_reason,
    least_error_of_pivots,
    with_exact_values,
)
from ..criteria import (
    DEFAULT_CRITERION,
    Basis,
    Errors,
    Key,
    LayerSpectra,
    Moments,
    Recompute,
    exact_spectra,
    layer_errors,
    with_outputs,
)
from ..layers import DecomposableLayer, Layer, decomposable, left_out_text, saying_what_is_left_out
from ..processes import World
from ..text import shape_text, table
from .budget_loop import PlanProblem, solve_shares
from .defaults import check_is_possible, resolved_criterion, resolved_norm
from .options import check_importance, check_plan_options
from .plan import Plan
from .plan_rows import LayerPlan, plan_row, warn_if_apart


@dataclass(frozen=True)
class Analysis:
    """The spectra of a model's layers; made by :func:`alds_fast.analyze`.

    Attributes:
        layers: every layer with a weight of two or more dimensions, with the reason if it is left out.
        spectra: by layer name, for those that are not.
        params: parameters of the model, shared ones once.
        model: the model itself, which budgets on operations and latency run.
        moments: by layer name, what the layers called with ``data`` see; empty without.
        max_groups: most channel slices tried by criteria that use them, None for no limit.
        recompute_in_float64: computes the spectra of some (layer, (scheme, groups)) in float64.
        world: the processes that plan together, each of which computes some layers' errors.
    """

    layers: tuple[Layer, ...]
    spectra: dict[str, LayerSpectra]
    params: int
    model: nn.Module = field(repr=False, compare=False)
    moments: dict[str, Moments] = field(default_factory=dict, repr=False, compare=False)
    max_groups: int | None = None
    recompute_in_float64: Recompute = field(default=exact_spectra, repr=False)
    world: World = field(default_factory=World, repr=False, compare=False)
    _errors: dict[tuple[str, bool, bool], list[Errors]] = field(default_factory=dict, repr=False, compare=False)
    _bases: dict[tuple[str, bool], Basis] = field(default_factory=dict, repr=False, compare=False)

    def plan(
        self,
        *,
        params: float | None = None,
        flops: float | None = None,
        latency: float | None = None,
        error: float | None = None,
        example_inputs: Any = None,
        criterion: str | None = None,
        p: float | None = None,
        method: str = "alds",
        align: int = 1,
        bias_correction: bool = True,
        importance: Mapping[str, float] | None = None,
        cache: str | os.PathLike[str] | bool | None = None,
        pivots: bool = True,
    ) -> Plan:
        """Choose (scheme, groups, rank), or dense, for every layer.

        The least p-norm of the layers' errors within one budget or all of several:

        Args:
            params: share of the whole model's parameters to keep, in (0, 1].
            flops: share of the floating-point operations of one run of the whole model to keep, in (0, 1], as
                ``torch.utils.flop_counter`` counts them.
            latency: share of the dense model's latency to keep, in (0, 1], on the device where model and inputs are;
                measured, see :mod:`alds_fast.allocation.latency`. More than 8 channel slices are not tried under it.
            error: largest relative error allowed, >= 0; the fewest parameters within it. Alone.
            example_inputs: what the model is run with for flops= and latency=: a tensor, a tuple or list of
                positional arguments, or a dict of keyword arguments.
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
            bias_correction: with data, a layer's bias takes up the mean of its error, where it has one of its own.
            importance: by layer name, factors >= 0 of the errors; 1 for those not named.
            pivots: try factors without an identity too, smaller at the same rank (:mod:`alds_fast.linalg.pivots`); in
                half types for errors of 5 % and more, as they round more coarsely. Baselines have plain factors.
            cache: folder where timings are kept between calls; None for ``$ALDS_FAST_CACHE`` or
                ``~/.cache/alds_fast``, False for none.

        Spectra that were computed in float32 (``analyze(precision="float32")``) are computed again in float64, and
        kept, for those in doubt (:mod:`alds_fast.allocation.float32_check`), so that the plan is that of float64 but
        for ties in its own rounding; for all unless the budget is one of params= or flops=, the criterion "frobenius",
        the method "alds".

        Warns:
            UserWarning: the latency measured in the end is not within 10 % of the one asked for (``Plan.latency``);
                errors on samples kept aside and those stated differ by more than a factor of 1.5; ``data=`` told too
                little to be used; no layer can be decomposed.

        Raises:
            BudgetError: no budget, two that exclude each other, out of range, or smaller than the smallest reachable.
            ArgumentError: another argument is out of range.
            ModelError: the model does not run with the example inputs, or has changed since its spectra were computed
                in float32.
        """
        shares = {"params": params, "flops": flops, "latency": latency}
        options: dict[str, Any] = {"criterion": criterion, "p": p, "method": method, "align": align, "cache": cache}
        options |= {"bias_correction": bias_correction, "importance": importance, "pivots": pivots}
        check_plan_options(shares, error, example_inputs, **options)
        layers = decomposable(self.layers)
        basis = self._basis(resolved_criterion(criterion, self.moments, method), bias_correction)
        if self.world.size > 1:
            basis.of_all(layers, self.world, basis.look_at)
        if criterion is None and method not in BASELINES:
            basis = self._basis_if_told(basis, layers)
        few = error is None and method not in BASELINES and basis.used and basis.goes_by_samples_kept_aside(layers)
        p = resolved_norm(p, basis.criterion, shares, method, few)
        weights = {layer.name: 1.0 for layer in layers}
        weights |= {name: float(w) for name, w in check_importance(importance, self.spectra).items()}
        budgets = [name for name, share in shares.items() if share is not None]
        if not check_is_possible(budgets, basis.criterion, method):
            self._recompute([(name, key) for name, s in self.spectra.items() for key in sorted(s.float32)])
        while True:
            choices = self._choices(layers, basis, align, weights, pivots and method not in BASELINES, few)
            spectra = [self.spectra[layer.name] for layer in layers]
            if method in BASELINES and BASELINES[method].needs_data:
                spectra = [with_outputs(s, basis) for s in spectra]
            problem = PlanProblem(self.model, self.params, layers, choices, spectra, method)
            if error is not None:
                outcome = problem.within(float(error))
                break
            with saying_what_is_left_out(self.layers):
                outcome = solve_shares(problem, shares, example_inputs, p, cache)
            doubt = problem.doubt(outcome, list(weights.values()), p)
            if not doubt:
                break
            self._recompute(doubt)
        if not layers:
            warnings.warn(f"no layer can be decomposed: {left_out_text(self.layers)}", stacklevel=2)
        picks = enumerate(zip(layers, outcome.choices, outcome.solution.picks, strict=True))
        chosen = {layer.name: (c, taken, dense_reason(outcome.tables, i)) for i, (layer, c, taken) in picks}
        rows = tuple(
            self._row(layer, chosen.get(layer.name), align, basis, weights.get(layer.name, 1.0))
            for layer in self.layers
        )
        warn_if_apart(rows)
        budget = ", ".join(f"{k}={float(v):g}" for k, v in {**shares, "error": error}.items() if v is not None)
        made = basis.criterion, method, float(p), int(align), outcome.solution.gap, outcome.latency
        return Plan(rows, self.params, budget, *made, basis.bias_correction, self._chosen_spectra(rows), basis)

    def _basis(self, criterion: str, bias_correction: bool) -> Basis:
        """What errors are measured by, kept for the next plan."""
        key = criterion, bias_correction
        return self._bases.setdefault(key, Basis(criterion, self.moments, bias_correction))

    def _basis_if_told(self, basis: Basis, layers: Sequence[DecomposableLayer]) -> Basis:
        """The basis, or, with a warning, the one without data where these tell next to nothing."""
        if not basis.used or not basis.untold(layers):
            return basis
        warnings.warn(
            f"data= has too few samples that differ to tell what the layers see: the plan goes by the weights alone "
            f"(criterion={DEFAULT_CRITERION!r}); pass more samples, or criterion={basis.criterion!r}",
            stacklevel=3,
        )
        return self._basis(DEFAULT_CRITERION, basis.bias_correction)

    def _row(self, layer: Layer, pick: Any, align: int, basis: Basis, weight: float) -> LayerPlan:
        row = plan_row(layer, pick, align)
        choice = row.choice
        if choice is None or not isinstance(layer, DecomposableLayer):
            return row
        fold, rank = choice.decomposition.fold, choice.decomposition.rank
        criterion = basis.criterion_of(layer.name)
        if criterion != basis.criterion:
            row = replace(row, criterion=criterion)
        row = replace(row, remark=basis.remark(layer.name))
        if not basis.has_kept_aside(layer):
            return row
        stated, held_out = (float(basis.fold_errors(layer, *fold, held_out=aside)[rank]) for aside in (False, True))
        return replace(row, error=weight * stated, held_out=held_out)

    def _recompute(self, wanted: Sequence[tuple[str, Key]]) -> None:
        """These spectra in float64, in the place of those there are; without any, known errors stay."""
        if not wanted:
            return
        for layer, key, values in self.recompute_in_float64([(self.spectra[name].layer, key) for name, key in wanted]):
            self.spectra[layer.name] = with_exact_values(self.spectra[layer.name], key, values)
        self._errors.clear()

    def _choices(
        self, layers: Sequence[DecomposableLayer], basis: Basis, align: int, weights: Mapping[str, float], pivots: bool,
        held_out: bool = False,
    ) -> list[Candidates]:  # fmt: skip
        """Every choice of the layers; their errors are kept for the next plan.

        If ``held_out``, those on samples kept aside, where there are some.
        """
        key = basis.criterion, basis.bias_correction, held_out
        if key not in self._errors:
            self._errors[key] = basis.of_all(layers, self.world, lambda layer: layer_errors(
                self.spectra[layer.name], basis, self.max_groups, held_out))  # fmt: skip
        choices = []
        for layer, errors in zip(layers, self._errors[key], strict=True):
            by_fold = {key: weights[layer.name] * e for key, e in errors.items()}
            least = weights[layer.name] * least_error_of_pivots(layer) if pivots else None
            choices.append(candidates(layer.shape, by_fold, align, least))
        return choices

    def _chosen_spectra(self, rows: Iterable[LayerPlan]) -> dict[str, Tensor]:
        return {
            row.name: self.spectra[row.name].values[row.scheme, row.groups]
            for row in rows
            if row.scheme is not None and row.groups is not None
        }

    def __repr__(self) -> str:
        return f"<Analysis of {len(self.layers)} layers, {len(self.spectra)} can be factorised; print() lists them>"

    def __str__(self) -> str:
        headers = ["layer", "kind", "shape", "params", "folds x groups", "reason left out"]
        rows = []
        for layer in self.layers:
            spectra = self.spectra.get(layer.name)
            folds = f"{len(spectra.top)} x {len(spectra.values) // len(spectra.top)}" if spectra else "-"
            cells = [layer.name or "(model)", layer.kind, shape_text(layer.weight), f"{layer.params:,}", folds]
            rows.append([*cells, layer.reason or ""])
        inside = sum(s.layer.shape.numel for s in self.spectra.values())
        total = f"{self.params:,} parameters, {inside:,} of them in {len(self.spectra)} layers that can be factorised"
        return table(headers, rows, left=(0, 1, 5)) + "\n" + total
