"""How many hidden units every group of layers keeps under a budget, and the analysis of the narrower model.

Which units go is settled once for each group (:mod:`alds_fast.criteria.hidden_units`). For some numbers of units left
the errors of its layers' ranks are worked out from parts of the moments that are there, and one price of a parameter
for the whole model decides (:mod:`alds_fast.allocation.widths`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...allocation import Front, Width, amount_text, pareto_front, widths_at_one_price
from ...criteria import (
    CRITERIA,
    Basis,
    HiddenUnits,
    LayerSpectra,
    find_hidden_units,
    kept_units,
    removal_errors,
    removal_order,
)
from ...factors import FewerUnits, narrow_model, narrow_moments
from ...layers import DecomposableLayer, count_bytes, count_params, decomposable, find_layers, is_plain_linear
from ...measurement import count_inputs
from ...progress import Progress, ProgressOption, telling
from ..budget_loop import PlanProblem, errors_of_layers
from ..options import Pin, check_needs, choices_of
from ..plan import Plan

_LOG = logging.getLogger(__name__)
LEFT = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8)  # of a group's units that may be left, beside all
STEP = 8  # numbers of units are multiples of it: matrix products of other sizes are slower


def widths_of(count: int, align: int) -> list[int]:
    """Numbers of units that may be left of ``count``, descending, all of them first.

    >>> widths_of(1536, 1), widths_of(30, 1), widths_of(7, 1)
    ([1536, 1344, 1152, 960, 768, 576], [30, 24, 16, 8], [7])
    """
    step = math.lcm(STEP, align)
    fewer = {round(share * count / step) * step for share in LEFT}
    return [count, *sorted((width for width in fewer if 0 < width < count), reverse=True)]


@dataclass(frozen=True)
class WidthSearch:
    """An analysis and what plans are made by: ``few``, ``weights``, ``pins`` as in :meth:`alds_fast.Analysis.plan`.

    ``asked``: the budgets by name, one of which is not None.
    """

    analysis: Any
    basis: Basis
    few: bool
    weights: Mapping[str, float]
    pins: Mapping[str, Pin]
    align: int
    pivots: bool
    asked: Mapping[str, float | None]
    example_inputs: Any

    def groups(self) -> list[HiddenUnits]:
        """Those whose layers are judged by gradients and by their inputs' moments, and not pinned."""
        layers = [x for x in decomposable(self.analysis.layers) if is_plain_linear(x.module) and self._is_known(x)]
        inputs = self.analysis.inputs if self.example_inputs is None else self.example_inputs
        return find_hidden_units(self.analysis.model, layers, inputs, "example_inputs")

    def _is_known(self, layer: DecomposableLayer) -> bool:
        if not CRITERIA[self.basis.criterion_of(layer.name)].needs_gradients or self.pins[layer.name].said:
            return False
        return self.basis.moments[layer.name].second is not None

    def choose(self, groups: Sequence[HiddenUnits], tell: Progress) -> tuple[Any, list[FewerUnits]]:
        """The analysis of the narrower model, and what is left of the groups that lose units."""
        layers = {layer.name: layer for layer in decomposable(self.analysis.layers)}
        variants: list[list[FewerUnits]] = []  # by group and width
        for done, group in enumerate(groups, 1):
            weights = self.basis.weighting(layers[group.consumer])
            assert weights is not None
            widths = widths_of(group.count, self.align)
            order = removal_order(weights, widths[-1])
            kept = [tuple(kept_units(order, group.count, width).tolist()) for width in widths]
            errors = [0.0, *removal_errors(weights, order, widths[1:])]
            names = group.producers, group.consumer, group.count
            variants.append([FewerUnits(*names, *found) for found in zip(kept, errors, strict=True)])
            tell("hidden units", done, len(groups))
        dense, budget = self._fronts(self.analysis, self.basis, list(layers))
        by_width, bases = [dense], [self.basis]
        for at in range(1, max(map(len, variants), default=0)):
            lost = [of_group[at] for of_group in variants if at < len(of_group)]
            analysis, basis = narrowed(self.analysis, self.basis, lost)
            by_width.append(self._fronts(analysis, basis, [name for units in lost for name in units.layers])[0])
            bases.append(basis)
            tell("widths", at, len(LEFT))
        choices = [[Width((self.weights[v.consumer] * v.error) ** 2, [by_width[at][n] for n in v.layers])
                    for at, v in enumerate(of_group)] for of_group in variants]  # fmt: skip
        inside = {name for group in groups for name in group.layers}
        others = [front for name, front in dense.items() if name not in inside]
        picks, price = widths_at_one_price(others, choices, budget)
        _LOG.info("hidden units: one price of %.3g of squared error", price)
        fewer = [of_group[at] for of_group, at in zip(variants, picks, strict=True) if at]
        analysis, basis = narrowed(self.analysis, self.basis, fewer)
        for of_group, at in zip(variants, picks, strict=True):
            if at:
                basis.learn(bases[at], of_group[at].layers)
        return analysis, fewer

    def _fronts(self, analysis: Any, basis: Basis, names: Collection[str]) -> tuple[dict[str, Front], float]:
        """Costs and errors of all that these layers may become, and what they may cost if all others stay."""
        layers = [layer for layer in decomposable(analysis.layers) if layer.name in names]
        spectra = [analysis.spectra[layer.name] for layer in layers]
        errors = errors_of_layers(spectra, basis, analysis.max_groups, self.few, analysis.world, False)
        choices, counted = choices_of(layers, errors, self.weights, self.align, self.pivots, self.pins), None
        if self.asked.get("flops") is not None:
            counted = count_inputs(analysis.model, self.example_inputs, [layer.name for layer in layers])
        sizes = analysis.params, count_bytes(analysis.model), counted
        (table,) = PlanProblem(analysis.model, *sizes, layers, choices).tables(self.asked)
        fronts = [pareto_front(costs, choice.errors) for costs, choice in zip(table.costs, choices, strict=True)]
        return dict(zip((layer.name for layer in layers), fronts, strict=True)), table.limit - table.fixed

    def plan(self, counted: Any, options: Mapping[str, Any], progress: ProgressOption) -> Plan:
        """The plan of the dense model that is asked for; ``counted`` are its operations, if there are inputs.

        ArgumentError for a criterion without gradients.
        """
        check_needs(self.basis.criterion, "alds", True, True, hidden_units=True)
        with telling(progress) as tell:
            analysis, fewer = self.choose(self.groups(), tell)
            name, amount = next((name, amount) for name, amount in self.asked.items() if amount is not None)
            costs = {"params": self.analysis.params, "memory": count_bytes(self.analysis.model)}
            costs |= {} if counted is None else {"flops": counted[1]}
            limit = math.floor(amount * costs[name] + 1e-9) if amount <= 1 else int(amount)
            asked = {name: limit if limit < costs[name] else 1.0}
            options = {**options, "example_inputs": self.example_inputs, "hidden_units": False}
            plan: Plan = analysis.plan(**asked, **options, progress=tell)
        return self._of_dense(plan, fewer, f"{name}={amount_text(amount)}", costs)

    def _of_dense(self, plan: Plan, fewer: Sequence[FewerUnits], budget: str, costs: Mapping[str, int]) -> Plan:
        """A plan of the narrower model as one of the model itself; ``costs`` are the model's, by name."""
        before = {layer.name: layer.params for layer in self.analysis.layers}
        texts = {name: units.text for units in fewer for name in units.layers}
        rows = []
        for row in plan.layers:
            if row.name in texts:
                own = row.reason if row.choice is None else row.remark
                text = "; ".join(part for part in (texts[row.name], own) if part)
                bias = row.params_before - math.prod(row.shape)
                row = replace(row, params_before=before[row.name], stored=before[row.name] - bias)
                row = replace(row, reason=text) if row.choice is None else replace(row, remark=text)
            rows.append(row)
        return replace(
            plan, layers=tuple(rows), params_before=self.analysis.params, budget=budget, hidden_units=tuple(fewer),
            costs={name: (costs.get(name, pair[0]), pair[1]) for name, pair in plan.costs.items()},
            spectra={name: values for name, values in plan.spectra.items() if name not in texts}, basis=self.basis,
        )  # fmt: skip


def narrowed(analysis: Any, basis: Basis, fewer: Sequence[FewerUnits]) -> tuple[Any, Basis]:
    """The analysis and the basis of the model without the hidden units that are not kept.

    Layers around hidden units are judged by moments alone, so that their spectra are not computed.
    """
    if not fewer:
        return analysis, basis
    names = {name for units in fewer for name in units.layers}
    model, moments = narrow_model(analysis.model, fewer, basis.weighting), narrow_moments(basis.moments, fewer)
    found = {layer.name: layer for layer in decomposable(find_layers(model)) if layer.name in names}
    empty, spectra = torch.zeros(0, dtype=torch.float64, device="cpu"), dict(analysis.spectra)
    for name, layer in found.items():
        keys = [key for key in spectra[name].values if layer.shape.slice_channels % key[1] == 0]
        spectra[name] = LayerSpectra(layer, dict.fromkeys(keys, empty), {})
    layers = tuple(found.get(layer.name, layer) for layer in analysis.layers)
    parts = basis.of_parts(moments, names)
    changed = {"layers": layers, "spectra": spectra, "params": count_params(model), "model": model, "moments": moments}
    bases = {(basis.criterion, basis.bias_correction): parts}
    return replace(analysis, **changed, _errors={}, _bases=bases), parts
