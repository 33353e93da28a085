"""Analyse a model once, then plan for any budget."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .candidates import Candidates, candidates
from .collector import Moments
from .costs import dense_reason
from .data_criteria import MAX_DATA_GROUPS, Basis, Errors, layer_errors, resolved_criterion, resolved_norm, with_outputs
from .discover import Layer, check_weight, count_params, find_layers
from .doubt import check_is_possible, put_exact
from .folding import SCHEMES
from .moments import Sensitivity, collect_moments
from .options import Groups, check_groups, check_importance, check_plan_options, check_schemes, is_single
from .plan import LayerPlan, Plan
from .planned import planned_row
from .refine import Problem, solve_shares
from .spectra import Key, LayerSpectra, Sharpen, exact_spectra, layer_spectra, with_groups
from .text import shape_text, table


@dataclass(frozen=True)
class Analysis:
    """The spectra of a model's layers; made by :func:`analyze`.

    Attributes:
        layers: every layer with a weight of two or more dimensions, with the reason if it is left out.
        spectra: by layer name, for those that are not.
        params: parameters of the model, shared ones once.
        model: the model itself, which budgets on operations and latency run.
        moments: by layer name, what the layers called with ``data`` see; empty without.
        max_groups: most channel slices tried by criteria that use them, None for no limit.
        sharpen: computes spectra in float64.
    """

    layers: tuple[Layer, ...]
    spectra: dict[str, LayerSpectra]
    params: int
    model: nn.Module = field(repr=False, compare=False)
    moments: dict[str, Moments] = field(default_factory=dict, repr=False, compare=False)
    max_groups: int | None = None
    sharpen: Sharpen = field(default=exact_spectra, repr=False)
    _errors: dict[tuple[str, bool], list[Errors]] = field(default_factory=dict, repr=False, compare=False)

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
    ) -> Plan:
        """Choose (scheme, groups, rank), or dense, for every layer.

        The least p-norm of the layers' errors within one budget or all of several:

        Args:
            params: share of the whole model's parameters to keep, in (0, 1].
            flops: share of the floating-point operations of one run of the whole model to keep, in (0, 1], as
                ``torch.utils.flop_counter`` counts them.
            latency: share of the dense model's latency to keep, in (0, 1], on the device where model and inputs are;
                measured, see :mod:`alds_fast.latency`. More than 8 channel slices are not tried under it.
            error: largest relative error allowed, >= 0; the fewest parameters within it. Alone.
            example_inputs: what the model is run with for flops= and latency=: a tensor, a tuple or list of
                positional arguments, or a dict of keyword arguments.
            criterion: "frobenius" (exact), "operator", "paper" (upper bounds) or "reference", see
                :mod:`alds_fast.bounds`; with data "output" (exact error of the layer's output on the data, relative to
                that output), "output-bound" (an upper bound of it) or, with gradients, "sensitivity" (what that error
                does to the network's output, to first order), see :mod:`alds_fast.weighted`. None for the best that
                the analysis allows: "sensitivity", "output", "frobenius".
            p: how layers are traded, 1 <= p <= inf; inf minimises the largest error, then the second largest, ...;
                exactly under one budget. Several budgets need p = inf; how far from the optimum is in ``Plan.gap``.
                None for 2 with "sensitivity", whose squares add up, 4 with other criteria, which is what measured
                best, and inf with several budgets or error=.
            method: "alds" (exact) or, for comparison, "alds-heuristic" (the paper's alternating search), "svd",
                "svd-energy", "svd-nuclear", "l-rank", "pca", "sum" or "uniform", see :mod:`alds_fast.baselines`: under
                one budget, of params= or flops=. Their ``Plan.gap`` is that of the largest error.
            align: ranks are multiples of it.
            bias_correction: with data, a layer's bias takes up the mean of its error, where it has one of its own.
            importance: by layer name, factors >= 0 of the errors; 1 for those not named.
            cache: folder where timings are kept between calls; None for ``$ALDS_FAST_CACHE`` or
                ``~/.cache/alds_fast``, False for none.

        Spectra that were computed in float32 (``analyze(precision="float32")``) are computed again in float64, and
        kept, for those in doubt (:mod:`alds_fast.doubt`), so that the plan is that of float64 but for ties in its own
        rounding; for all unless the budget is one of params= or flops=, the criterion "frobenius", the method "alds".

        Warns:
            UserWarning: the latency measured in the end is not within 10 % of the one asked for (``Plan.latency``).

        Raises:
            BudgetError: no budget, two that exclude each other, out of range, or smaller than the smallest reachable.
            ArgumentError: another argument is out of range.
            ModelError: the model does not run with the example inputs, or has changed since its spectra were computed
                in float32.
        """
        shares = {"params": params, "flops": flops, "latency": latency}
        basis = Basis(resolved_criterion(criterion, self.moments, method), self.moments, bool(bias_correction))
        p = resolved_norm(p, basis.criterion, shares, method)
        options = {"criterion": basis.criterion, "p": p, "method": method, "align": align, "cache": cache}
        options |= {"bias_correction": bias_correction, "importance": importance}
        check_plan_options(shares, error, example_inputs, **options)
        layers = [layer for layer in self.layers if layer.name in self.spectra]
        weights = {layer.name: 1.0 for layer in layers}
        weights |= {name: float(w) for name, w in check_importance(importance, self.spectra).items()}
        budgets = [name for name, share in shares.items() if share is not None]
        if not check_is_possible(budgets, basis.criterion, method):
            self._sharpen([(name, key) for name, s in self.spectra.items() for key in sorted(s.single)])
        while True:
            choices = self._choices(layers, basis, align, weights)
            spectra = [with_outputs(self.spectra[layer.name], basis, method) for layer in layers]
            problem = Problem(self.model, self.params, layers, choices, spectra, method)
            if error is not None:
                outcome = problem.within(float(error))
                break
            outcome = solve_shares(problem, shares, example_inputs, p, cache)
            doubt = problem.doubt(outcome, list(weights.values()), p)
            if not doubt:
                break
            self._sharpen(doubt)
        picks = enumerate(zip(layers, outcome.choices, outcome.solution.found, strict=True))
        chosen = {layer.name: (c, taken, dense_reason(outcome.tables, i)) for i, (layer, c, taken) in picks}
        rows = tuple(planned_row(layer, chosen.get(layer.name), align, basis.reason(layer)) for layer in self.layers)
        budget = ", ".join(f"{k}={float(v):g}" for k, v in {**shares, "error": error}.items() if v is not None)
        made = basis.criterion, method, float(p), int(align), outcome.solution.gap, outcome.latency
        return Plan(rows, self.params, budget, *made, basis.bias_correction, self._chosen_spectra(rows), basis)

    def _sharpen(self, wanted: Sequence[tuple[str, Key]]) -> None:
        """These spectra in float64, in the place of those there are."""
        for layer, key, values in self.sharpen([(self.spectra[name].layer, key) for name, key in wanted]):
            self.spectra[layer.name] = put_exact(self.spectra[layer.name], key, values)
        self._errors.clear()

    def _choices(
        self, layers: Sequence[Layer], basis: Basis, align: int, weights: Mapping[str, float]
    ) -> list[Candidates]:
        """Every choice of the layers; their errors are kept for the next plan."""
        key = basis.criterion, basis.bias_correction
        if key not in self._errors:
            self._errors[key] = [layer_errors(self.spectra[layer.name], basis, self.max_groups) for layer in layers]
        found = []
        for layer, errors in zip(layers, self._errors[key], strict=True):
            assert layer.shape is not None
            found.append(candidates(layer.shape, {k: weights[layer.name] * e for k, e in errors.items()}, align))
        return found

    def _chosen_spectra(self, rows: Iterable[LayerPlan]) -> dict[str, Tensor]:
        return {
            row.name: self.spectra[row.name].values[row.scheme, row.groups]
            for row in rows
            if row.scheme is not None and row.groups is not None
        }

    def __str__(self) -> str:
        headers = ["layer", "kind", "shape", "params", "folds x groups", "reason left out"]
        rows = []
        for layer in self.layers:
            found = self.spectra.get(layer.name)
            folds = f"{len(found.top)} x {len(found.values) // len(found.top)}" if found else "-"
            cells = [layer.name or "(model)", layer.kind, shape_text(layer.weight), f"{layer.params:,}", folds]
            rows.append([*cells, layer.reason or ""])
        inside = sum(s.layer.shape.numel for s in self.spectra.values() if s.layer.shape)
        total = f"{self.params:,} parameters, {inside:,} of them in {len(self.spectra)} layers that can be factorised"
        return table(headers, rows, left=(0, 1, 5)) + "\n" + total


def analyze(
    model: nn.Module,
    *,
    schemes: Sequence[int] = SCHEMES,
    groups: Groups = "divisors",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    data: Iterable[Any] | None = None,
    sensitivity: Sensitivity = False,
    mask: str | None = "attention_mask",
    moment_order: int = 8192,
    precision: str = "float64",
) -> Analysis:
    """Spectra of every layer under every fold and number of channel slices; the model is not changed.

    Args:
        model: any ``nn.Module``; its Linear and Conv1d/2d/3d layers are analysed, on CPU or CUDA, in any floating
            type.
        schemes: the folds to try, see :mod:`alds_fast.folding`.
        groups: numbers of channel slices to try: "divisors" for all divisors of a layer's channels, or a sequence.
        include, exclude: shell-style patterns of layer names, one or several.
        data: batches of the model's inputs, each a tensor, a tuple of positional or a mapping of keyword arguments;
            the moments of the layers' inputs are collected on them, see :func:`alds_fast.moments.collect_moments`.
        sensitivity: with data, also collect gradients: True for those of the model's first output, or a function of
            (output, batch) that returns the tensor whose squared error matters, or a loss.
        mask: name of the keyword argument (samples, tokens) that is 1 at tokens and 0 at padding, which does not count.
        moment_order: layers whose inputs have more entries (channels * kernel area) get the moment of their output,
            which allows the encode fold with one slice only.
        precision: "float64", or "float32" for weights on the CPU of no wider type: spectra in half the time, for plans
            that come to the same (:meth:`Analysis.plan`); leave the model as it is until these are made.

    Raises:
        WeightError: a layer has NaN or infinite weights, or none at all (meta device).
        LayerNotFoundError: a pattern matches no layer.
        ArgumentError, ModelError: an argument is out of range or not a module.

    >>> import torch
    >>> analysis = analyze(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()))
    >>> plan = analysis.plan(params=0.5)
    >>> plan.params <= 0.5 * analysis.params
    True
    """
    found = analyze_with_progress(model, schemes, groups, include, exclude, precision)
    return found if data is None else with_data(found, data, sensitivity, mask, moment_order, groups)


def with_data(
    analysis: Analysis,
    data: Iterable[Any],
    sensitivity: Sensitivity,
    mask: str | None = "attention_mask",
    order: int = 8192,
    groups: Groups = "divisors",
) -> Analysis:
    """The analysis, made with these ``groups``, with moments collected on ``data``; arguments as of analyze."""
    limit = MAX_DATA_GROUPS if groups == "divisors" else None
    layers = [layer for layer in analysis.layers if layer.name in analysis.spectra]
    found = collect_moments(analysis.model, data, layers, sensitivity=sensitivity, mask=mask, order=order)
    own = dict(analysis.spectra)  # plans may put others in their place
    return dataclasses.replace(analysis, spectra=own, moments=found, max_groups=limit, _errors={})


def analyze_with_progress(
    model: nn.Module,
    schemes: Sequence[int],
    groups: Groups,
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    precision: str = "float64",
    start: Callable[[Sequence[Layer]], Callable[[int], None]] = lambda layers: lambda n: None,
) -> Analysis:
    """:func:`analyze` that calls ``start(layers)`` before the work and what that returns after each part of it."""
    schemes, groups, single = check_schemes(schemes), check_groups(groups), is_single(precision)
    layers = [with_groups(layer, groups) for layer in find_layers(model, include, exclude)]
    ready = [layer for layer in layers if layer.reason is None]
    for layer in ready:
        check_weight(layer)
    found = layer_spectra(ready, schemes, groups, start(ready), single=single)
    return Analysis(tuple(layers), {s.layer.name: s for s in found}, count_params(model), model)
