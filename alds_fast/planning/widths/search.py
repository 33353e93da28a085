"""How many hidden units every group of layers keeps under a budget, and the analysis of the narrower model.

Which units go is settled once for each group (:mod:`alds_fast.criteria.hidden_units`). For some numbers of units left
the errors of its layers' ranks are worked out from parts of the moments that are there, and one price of a parameter
for the whole model decides (:mod:`alds_fast.allocation.widths`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ...allocation import Calls, CostTable, Front, Width, amount_text, pareto_front, widths_at_one_price
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
from ...factors import FewerUnits, NarrowMoments, narrow_layers, narrow_model
from ...layers import (
    DecomposableLayer,
    as_narrowed,
    count_bytes,
    count_params,
    decomposable,
    find_layers,
    is_plain_linear,
    with_sizes,
)
from ...progress import Progress, ProgressOption, telling
from ..budgets import PlanProblem, errors_of_layers
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


class _Variant(NamedTuple):
    """A group with some of its units, what that costs, and the errors of its layers that are known."""

    units: FewerUnits
    width: Width
    known: dict[Any, torch.Tensor]


@dataclass(frozen=True)
class WidthSearch:
    """An analysis and what plans are made by: ``few``, ``weights``, ``pins`` as in :meth:`alds_fast.Analysis.plan`.

    ``asked``: the budgets by name, one of which is not None; ``counted``: calls of the layers, and the operations of a
    run, where there are example inputs; ``activations`` as :class:`PlanProblem` has them.
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
    counted: tuple[Calls, int] | None
    activations: tuple[int, int] | None

    def groups(self) -> list[HiddenUnits]:
        """Those whose layers are judged by gradients and by their inputs' moments, and not pinned."""
        layers = [x for x in decomposable(self.analysis.layers) if is_plain_linear(x.module) and self._is_known(x)]
        inputs, called = self.example_inputs, "example_inputs"
        if inputs is None:
            inputs, called = self.analysis.inputs, "batch 1 of data="
        return find_hidden_units(self.analysis.model, layers, inputs, called)

    def _is_known(self, layer: DecomposableLayer) -> bool:
        if not CRITERIA[self.basis.criterion_of(layer.name)].needs_gradients or self.pins[layer.name].said:
            return False
        return self.basis.moments[layer.name].second is not None

    @property
    def _key(self) -> str:
        """What decides the errors and costs of all widths: plans for other amounts of one budget share them."""
        (budget,) = (name for name, amount in self.asked.items() if amount is not None)
        calls = self.counted if budget == "flops" else None
        made = self.basis.criterion, self.basis.bias_correction, self.few, self.align, self.pivots
        seen = id(self.analysis.moments), id(self.analysis.model)
        return repr((budget, calls, made, seen, sorted(self.weights.items()), sorted(self.pins.items())))

    def choose(self, tell: Progress) -> tuple[Any, list[FewerUnits]]:
        """The analysis of the narrower model, and what is left of the groups that lose units."""
        layers = {layer.name: layer for layer in decomposable(self.analysis.layers)}
        table, dense = self._fronts(list(layers.values()), self.analysis.spectra, self.basis)
        kept: dict[str, list[list[_Variant]]] = self.analysis._widths
        if self._key not in kept:
            groups, variants = self.groups(), list[list[_Variant]]()
            for done, group in enumerate(groups, 1):
                variants.append(self._variants(group, layers, dense))
                tell("hidden units", done, len(groups))
            kept[self._key] = variants
        variants = kept[self._key]
        inside = {name for of_group in variants for name in of_group[0].units.layers}
        others = [front for name, front in dense.items() if name not in inside]
        budget = table.limit - table.fixed
        picks, price = widths_at_one_price(others, [[v.width for v in of] for of in variants], budget)
        _LOG.info("hidden units: one price of %.3g of squared error", price)
        chosen = [of[at] for of, at in zip(variants, picks, strict=True) if at]
        known = {key: value for variant in chosen for key, value in variant.known.items()}
        fewer = [variant.units for variant in chosen]
        return self._narrowed(fewer, known), fewer

    def _variants(
        self, group: HiddenUnits, layers: Mapping[str, DecomposableLayer], dense: Mapping[str, Front]
    ) -> list[_Variant]:
        """A group with all its units, and with each number of them that is tried."""
        names, inside = (group.producers, group.consumer, group.count), {n: layers[n] for n in group.layers}
        weights = self.basis.weighting(layers[group.consumer])
        assert weights is not None
        widths = widths_of(group.count, self.align)
        order = removal_order(weights, widths[-1])
        whole = FewerUnits(*names, tuple(range(group.count)), 0.0)
        variants = [_Variant(whole, Width(0.0, [dense[name] for name in group.layers]), {})]
        for width, error in zip(widths[1:], removal_errors(weights, order, widths[1:]), strict=True):
            units = FewerUnits(*names, tuple(kept_units(order, group.count, width).tolist()), error)
            modules = narrow_layers(inside, units, lambda layer: weights)
            narrow = [as_narrowed(inside[name], modules[name]) for name in group.layers]
            basis = self.basis.of_parts(NarrowMoments(self.basis.moments, [units]), inside.keys())
            spectra = {layer.name: _keys_alone(self.analysis.spectra[layer.name], layer) for layer in narrow}
            fronts = list(self._fronts(narrow, spectra, basis)[1].values())
            known = {key: value for key, value in basis.known.items() if key[0] in inside}
            variants.append(_Variant(units, Width((self.weights[group.consumer] * error) ** 2, fronts), known))
        return variants

    def _fronts(
        self, layers: Sequence[DecomposableLayer], spectra: Mapping[str, LayerSpectra], basis: Basis
    ) -> tuple[CostTable, dict[str, Front]]:
        """What all that these layers may become costs, and costs and errors of what is best."""
        of, most, world = [spectra[layer.name] for layer in layers], self.analysis.max_groups, self.analysis.world
        errors = errors_of_layers(of, basis, most, self.few, world, False)
        for layer, folds in zip(layers, errors, strict=True):
            if basis.has_kept_aside(layer):  # said of what is chosen
                for key in folds:
                    basis.fold_errors(layer, *key, held_out=True)
        choices = choices_of(layers, errors, self.weights, self.align, self.pivots, self.pins)
        counted = None if self.counted is None else (_calls_of(layers, self.counted[0]), self.counted[1])
        sizes = self.analysis.params, count_bytes(self.analysis.model), counted, self.activations
        (table,) = PlanProblem(self.analysis.model, *sizes, layers, choices).tables(self.asked)
        fronts = [pareto_front(costs, choice.errors) for costs, choice in zip(table.costs, choices, strict=True)]
        return table, {layer.name: front for layer, front in zip(layers, fronts, strict=True)}

    def _narrowed(self, fewer: Sequence[FewerUnits], known: Mapping[Any, torch.Tensor]) -> Any:
        """The analysis of the model without the hidden units that are not kept, with the errors ``known`` of layers.

        Its layers have no values where the model need not run: their errors are known.
        """
        if not fewer:
            return self.analysis
        model, names = self.analysis.model, {name for units in fewer for name in units.layers}
        if self.counted is None:
            layers = {layer.name: layer for layer in self.analysis.layers}
            narrow = with_sizes(model, {n: sizes for units in fewer for n, sizes in units.sizes(layers).items()})
        else:
            narrow = narrow_model(model, fewer, self.basis.weighting)
        found = {layer.name: layer for layer in decomposable(find_layers(narrow)) if layer.name in names}
        spectra = {**self.analysis.spectra}
        spectra |= {name: _keys_alone(spectra[name], layer) for name, layer in found.items()}
        own = tuple(found.get(layer.name, layer) for layer in self.analysis.layers)
        basis = self.basis.of_parts(NarrowMoments(self.basis.moments, fewer), names)
        basis.known.update(known)
        changed = {"layers": own, "spectra": spectra, "params": count_params(narrow), "model": narrow}
        bases = {(basis.criterion, basis.bias_correction): basis}
        return replace(self.analysis, **changed, moments=basis.moments, _errors={}, _bases=bases)

    def plan(self, options: Mapping[str, Any], progress: ProgressOption) -> Plan:
        """The plan of the dense model that is asked for. ArgumentError for a criterion without gradients."""
        check_needs(self.basis.criterion, "alds", True, True, hidden_units=True)
        with telling(progress) as tell:
            analysis, fewer = self.choose(tell)
            name, amount = next((name, amount) for name, amount in self.asked.items() if amount is not None)
            costs = {"params": self.analysis.params, "memory": count_bytes(self.analysis.model)}
            costs |= {} if self.counted is None else {"flops": self.counted[1]}
            costs |= {} if self.activations is None else {"activations": self.activations[0]}
            total = costs[name] + costs.get("activations", 0)
            limit = max(2, math.floor(amount * total + 1e-9)) if amount <= 1 else int(amount)  # 1 is a share
            asked = {name: limit if limit < total else 1.0}
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


def _keys_alone(spectra: LayerSpectra, layer: DecomposableLayer) -> LayerSpectra:
    """Folds and slices without singular values, which do not matter where moments judge."""
    empty = torch.zeros(0, dtype=torch.float64, device="cpu")
    keys = [key for key in spectra.values if layer.shape.slice_channels % key[1] == 0]
    return LayerSpectra(layer, dict.fromkeys(keys, empty), {})


def _calls_of(layers: Sequence[DecomposableLayer], calls: Calls) -> Calls:
    """The calls of layers with other numbers of inputs."""
    return {
        layer.name: {replace(spec, shape=(*spec.shape[:-1], layer.shape.in_channels)) if is_plain_linear(layer.module)
                     else spec: times for spec, times in calls[layer.name].items()}
        for layer in layers
    }  # fmt: skip
