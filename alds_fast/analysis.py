"""Analyse a model once, then plan for any budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .allocate import Allocation, Front, allocate, gap, threshold
from .baselines import alds_heuristic
from .bounds import CRITERIA
from .candidates import Candidates, candidates
from .discover import Layer, check_weight, count_params, find_layers
from .errors import ArgumentError, BudgetError
from .factorize import Choice
from .folding import SCHEMES
from .options import Groups, check_groups, check_plan_options, check_schemes
from .plan import LayerPlan, Plan, params_of
from .spectra import LayerSpectra, candidate_groups, layer_spectra
from .text import shape_text, table


@dataclass(frozen=True)
class Analysis:
    """The spectra of a model's layers; made by :func:`analyze`.

    Attributes:
        layers: every layer with a weight of two or more dimensions, with the reason if it is left out.
        spectra: by layer name, for those that are not.
        params: parameters of the model, shared ones once.
    """

    layers: tuple[Layer, ...]
    spectra: dict[str, LayerSpectra]
    params: int

    def plan(
        self,
        *,
        params: float | None = None,
        error: float | None = None,
        criterion: str = "frobenius",
        p: float = math.inf,
        method: str = "alds",
        align: int = 1,
    ) -> Plan:
        """Choose (scheme, groups, rank), or dense, for every layer.

        Args:
            params: share of the whole model's parameters to keep, in (0, 1]; the least p-norm of errors within it, or
            error: largest relative error allowed, >= 0; the fewest parameters within it. Exactly one of the two.
            criterion: "frobenius" (exact), "operator", "paper" (upper bounds) or "reference"; see
                :mod:`alds_fast.bounds`.
            p: how layers are traded, 1 <= p <= inf; inf minimises the largest error exactly, then the second largest,
                ...
            method: "alds" (exact) or "alds-heuristic" (the paper's alternating search, for comparison).
            align: ranks are multiples of it.

        Raises:
            BudgetError: no budget, two, out of range, or smaller than the smallest reachable one.
            ArgumentError: another argument is out of range.
        """
        check_plan_options(params, error, criterion, p, method, align)
        score = CRITERIA[criterion]
        names = [layer.name for layer in self.layers if layer.name in self.spectra]
        choices = [candidates(self.spectra[name], score, align) for name in names]
        fronts = [c.front() for c in choices]
        if error is not None:
            allocation = Allocation(threshold(fronts, float(error)), 0.0)
        else:
            allocation = allocate(fronts, self._budget(choices, fronts, float(params or 0.0)), p)
        picks, certified = allocation.picks, 0.0
        if method == "alds-heuristic":
            found = alds_heuristic(choices, self._budget(choices, fronts, float(params or 0.0)))
            certified = _heuristic_gap(choices, found, allocation.bound)
        else:
            found = [int(f.index[i]) for f, i in zip(fronts, picks, strict=True)]
            certified = gap(fronts, picks, allocation.bound, p) if error is None else 0.0
        chosen = {n: (c, i) for n, c, i in zip(names, choices, found, strict=True)}
        rows = tuple(_row(layer, chosen.get(layer.name), align) for layer in self.layers)
        budget = f"params={float(params):g}" if params is not None else f"error={float(error or 0.0):g}"
        spectra = self._chosen_spectra(rows)
        return Plan(rows, self.params, budget, criterion, method, float(p), int(align), certified, spectra)

    def _budget(self, choices: Sequence[Candidates], fronts: Sequence[Front], params: float) -> int:
        """Parameters that the candidates may cost together; BudgetError if even the cheapest ones cost more."""
        fixed = self.params - sum(c.dense_cost for c in choices)
        least = fixed + sum(int(f.costs[0]) for f in fronts)
        target = math.floor(params * self.params + 1e-9)
        if least > target:
            share = math.ceil(10_000 * least / self.params) / 10_000
            raise BudgetError(
                f"params={params:g} cannot be met: the smallest reachable is params={share:g}, {least:,} of "
                f"{self.params:,} parameters; {fixed:,} of them are not in weights that can be factorised"
            )
        return target - fixed

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


def _heuristic_gap(choices: Sequence[Candidates], found: Sequence[int], bound: float) -> float:
    worst = max((float(c.errors[i]) for c, i in zip(choices, found, strict=True)), default=0.0)
    return 0.0 if worst <= bound else worst / bound - 1.0 if bound > 0 else math.inf


def _row(layer: Layer, pick: tuple[Candidates, int] | None, align: int) -> LayerPlan:
    groups = layer.shape.conv_groups if layer.shape else 1
    row: dict[str, Any] = {"name": layer.name, "kind": layer.kind, "shape": layer.weight, "conv_groups": groups}
    row |= {"scheme": None, "groups": None, "rank": None, "error": 0.0}
    row |= {"params_before": layer.params, "params_after": layer.params, "reason": layer.reason}
    if pick is None:
        return LayerPlan(**row)
    choices, candidate = pick
    chosen = choices.choice(candidate)
    if chosen is None:
        multiples = f" with ranks that are multiples of {align}" if align > 1 else ""
        none = f"no factorisation{multiples} is smaller"
        return LayerPlan(**{**row, "reason": none if not choices.curves else "the budget lets it stay dense"})
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
    return Analysis(tuple(layers), {s.layer.name: s for s in found}, count_params(model))


def _without_groups(layer: Layer, groups: Groups) -> Layer:
    """The layer, left out if none of the groups divides its channels."""
    if layer.reason is not None or layer.shape is None or candidate_groups(layer.shape.slice_channels, groups):
        return layer
    return Layer(
        **{**vars(layer), "reason": f"none of groups={groups} divides its {layer.shape.slice_channels} channels"}
    )


def compress(model: nn.Module, *, params: float | None = None, error: float | None = None, **options: Any) -> nn.Module:
    """Analyse, plan and apply in one call: a new, smaller model; ``model`` is not changed.

    ``options`` are those of :func:`analyze` (schemes, groups, include, exclude) and of :meth:`Analysis.plan`
    (criterion, p, method, align). Raises what these raise, and ArgumentError for an unknown option.

    >>> import torch
    >>> compress(torch.nn.Linear(64, 64), params=0.5, groups=(1,))
    LowRankLinear(in_features=64, out_features=64, scheme=0, groups=1, rank=15)
    """
    known = {"schemes", "groups", "include", "exclude"}, {"criterion", "p", "method", "align"}
    unknown = set(options) - known[0] - known[1]
    if unknown:
        raise ArgumentError(
            f"unknown option {sorted(unknown)[0]!r}; options are {', '.join(sorted(known[0] | known[1]))}"
        )
    planning = {k: v for k, v in options.items() if k in known[1]}
    checked = {"criterion": "frobenius", "p": math.inf, "method": "alds", "align": 1} | planning
    check_plan_options(params, error, **checked)  # before the work
    analysis = analyze(model, **{k: v for k, v in options.items() if k in known[0]})
    return analysis.plan(params=params, error=error, **planning).apply(model)
