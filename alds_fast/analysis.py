"""Analyse a model once, then plan for any budget."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .bounds import CRITERIA
from .candidates import Candidates, candidates
from .costs import dense_reason, params_table, solve_error
from .discover import Layer, check_weight, count_params, find_layers
from .errors import ArgumentError
from .factorize import Choice
from .folding import SCHEMES
from .options import Groups, check_groups, check_plan_options, check_schemes
from .plan import LayerPlan, Plan
from .refine import Outcome, Problem, solve_shares
from .rows import params_of
from .spectra import LayerSpectra, candidate_groups, layer_spectra
from .text import shape_text, table


@dataclass(frozen=True)
class Analysis:
    """The spectra of a model's layers; made by :func:`analyze`.

    Attributes:
        layers: every layer with a weight of two or more dimensions, with the reason if it is left out.
        spectra: by layer name, for those that are not.
        params: parameters of the model, shared ones once.
        model: the model itself, which budgets on operations and latency run.
    """

    layers: tuple[Layer, ...]
    spectra: dict[str, LayerSpectra]
    params: int
    model: nn.Module = field(repr=False, compare=False)

    def plan(
        self,
        *,
        params: float | None = None,
        flops: float | None = None,
        latency: float | None = None,
        error: float | None = None,
        example_inputs: Any = None,
        criterion: str = "frobenius",
        p: float = math.inf,
        method: str = "alds",
        align: int = 1,
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
            criterion: "frobenius" (exact), "operator", "paper" (upper bounds) or "reference"; see
                :mod:`alds_fast.bounds`.
            p: how layers are traded, 1 <= p <= inf; inf minimises the largest error, then the second largest, ...;
                exactly under one budget. Several budgets need p = inf; how far from the optimum is in ``Plan.gap``.
            method: "alds" (exact) or, for comparison, "alds-heuristic" (the paper's alternating search), "svd",
                "svd-energy", "svd-nuclear", "l-rank", "pca", "sum" or "uniform", see :mod:`alds_fast.baselines`: under
                one budget, of params= or flops=. Their ``Plan.gap`` is that of the largest error.
            align: ranks are multiples of it.
            cache: folder where timings are kept between calls; None for ``$ALDS_FAST_CACHE`` or
                ``~/.cache/alds_fast``, False for none.

        Warns:
            UserWarning: the latency measured in the end is not within 10 % of the one asked for (``Plan.latency``).

        Raises:
            BudgetError: no budget, two that exclude each other, out of range, or smaller than the smallest reachable.
            ArgumentError: another argument is out of range.
            ModelError: the model does not run with the example inputs.
        """
        shares = {"params": params, "flops": flops, "latency": latency}
        options = {"criterion": criterion, "p": p, "method": method, "align": align, "cache": cache}
        check_plan_options(shares, error, example_inputs, **options)
        layers = [layer for layer in self.layers if layer.name in self.spectra]
        choices = [candidates(self.spectra[layer.name], CRITERIA[criterion], align) for layer in layers]
        if error is not None:
            by_params = params_table(choices, self.params, 1.0)
            outcome = Outcome(choices, solve_error(choices, float(error)), [by_params])
        else:
            spectra = [self.spectra[layer.name] for layer in layers]
            problem = Problem(self.model, self.params, layers, choices, spectra, method)
            outcome = solve_shares(problem, shares, example_inputs, p, cache)
        picks = zip(outcome.choices, outcome.solution.found, strict=True)
        chosen = {layer.name: (*pick, dense_reason(outcome.tables, i))
                  for i, (layer, pick) in enumerate(zip(layers, picks, strict=True))}  # fmt: skip
        rows = tuple(_row(layer, chosen.get(layer.name), align) for layer in self.layers)
        budget = ", ".join(f"{k}={float(v):g}" for k, v in {**shares, "error": error}.items() if v is not None)
        made = criterion, method, float(p), int(align), outcome.solution.gap, outcome.latency
        return Plan(rows, self.params, budget, *made, self._chosen_spectra(rows))

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


def _row(layer: Layer, pick: tuple[Candidates, int, str] | None, align: int) -> LayerPlan:
    groups = layer.shape.conv_groups if layer.shape else 1
    row: dict[str, Any] = {"name": layer.name, "kind": layer.kind, "shape": layer.weight, "conv_groups": groups}
    row |= {"scheme": None, "groups": None, "rank": None, "error": 0.0}
    row |= {"params_before": layer.params, "params_after": layer.params, "reason": layer.reason}
    if pick is None:
        return LayerPlan(**row)
    choices, candidate, reason = pick
    chosen = choices.choice(candidate)
    if chosen is None:
        multiples = f" with ranks that are multiples of {align}" if align > 1 else ""
        none = f"no factorisation{multiples} is smaller"
        return LayerPlan(**{**row, "reason": reason if choices.curves else none})
    scheme, groups, rank = chosen
    assert layer.shape is not None
    row |= {"scheme": scheme, "groups": groups, "rank": rank, "error": float(choices.errors[candidate])}
    row["params_after"] += params_of(Choice(layer.name, layer.shape, *chosen)) - layer.shape.numel
    return LayerPlan(**row)


def analyze(
    model: nn.Module,
    *,
    schemes: Sequence[int] = SCHEMES,
    groups: Groups = "divisors",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> Analysis:
    """Spectra of every layer under every fold and number of channel slices; the model is not changed.

    Args:
        model: any ``nn.Module``; its Linear and Conv1d/2d/3d layers are analysed, on CPU or CUDA, in any floating
            type.
        schemes: the folds to try, see :mod:`alds_fast.folding`.
        groups: numbers of channel slices to try: "divisors" for all divisors of a layer's channels, or a sequence.
        include, exclude: shell-style patterns of layer names, one or several.

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
    return analyze_with_progress(model, schemes, groups, include, exclude, lambda layers: lambda n: None)


def analyze_with_progress(
    model: nn.Module,
    schemes: Sequence[int],
    groups: Groups,
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    start: Callable[[Sequence[Layer]], Callable[[int], None]],
) -> Analysis:
    """:func:`analyze` that calls ``start(layers)`` before the work and what that returns after each part of it."""
    schemes, groups = check_schemes(schemes), check_groups(groups)
    layers = [_without_groups(layer, groups) for layer in find_layers(model, include, exclude)]
    ready = [layer for layer in layers if layer.reason is None]
    for layer in ready:
        check_weight(layer)
    found = layer_spectra(ready, schemes, groups, start(ready))
    return Analysis(tuple(layers), {s.layer.name: s for s in found}, count_params(model), model)


def _without_groups(layer: Layer, groups: Groups) -> Layer:
    """The layer, left out if none of the groups divides its channels."""
    if layer.reason is not None or layer.shape is None or candidate_groups(layer.shape.slice_channels, groups):
        return layer
    return Layer(
        **{**vars(layer), "reason": f"none of groups={groups} divides its {layer.shape.slice_channels} channels"}
    )


_ANALYSIS_OPTIONS = {"schemes", "groups", "include", "exclude"}
_PLAN_OPTIONS = {"criterion", "p", "method", "align", "cache"}


def compress(
    model: nn.Module,
    *,
    params: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    error: float | None = None,
    example_inputs: Any = None,
    **options: Any,
) -> nn.Module:
    """Analyse, plan and apply in one call: a new, smaller model; ``model`` is not changed.

    ``options`` are those of :func:`analyze` (schemes, groups, include, exclude) and of :meth:`Analysis.plan`
    (criterion, p, method, align, cache). Raises what these raise, and ArgumentError for an unknown option.

    >>> import torch
    >>> compress(torch.nn.Linear(64, 64), params=0.5, groups=(1,))
    LowRankLinear(in_features=64, out_features=64, scheme=0, groups=1, rank=15)
    """
    unknown = sorted(set(options) - _ANALYSIS_OPTIONS - _PLAN_OPTIONS)
    if unknown:
        known = ", ".join(sorted(_ANALYSIS_OPTIONS | _PLAN_OPTIONS))
        raise ArgumentError(f"unknown option {unknown[0]!r}; options are {known}")
    planning = {k: v for k, v in options.items() if k in _PLAN_OPTIONS}
    shares = {"params": params, "flops": flops, "latency": latency}
    check_plan_options(shares, error, example_inputs, **planning)  # before the work
    analysis = analyze(model, **{k: v for k, v in options.items() if k in _ANALYSIS_OPTIONS})
    budgets = {**shares, "error": error, "example_inputs": example_inputs}
    return analysis.plan(**{**budgets, **planning}).apply(model)
