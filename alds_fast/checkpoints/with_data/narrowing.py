"""Layers of a checkpoint that lose hidden units: their weights, in the journal group by group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...criteria import Basis
from ...factors import narrow_layers
from ...layers import DecomposableLayer, filters_first, narrow_layer
from ...planning import Plan
from ..safetensors_reader import DTYPES
from ..streaming.journal import put_changed
from ..streaming.streamed_model import Work
from .mapped import let_go, load_mapped

NARROW = "narrow"
_NOTES = {"method": "narrowed", "iterations": 0, "error": 0.0, "data_error": 0.0}


def narrow_groups(work: Work, plan: Plan, basis: Basis, layers: Mapping[str, DecomposableLayer]) -> None:
    """The layers of all groups, narrower, where they are not there yet."""
    numbers = {layer.name: i for i, layer in work.ready.items()}
    groups = {numbers[units.consumer]: units for units in plan.hidden_units}
    left = [n for n, units in groups.items() if not all(work.journal.has(NARROW, numbers[i]) for i in units.layers)]
    own = work.share(left)
    for count, number in enumerate(own, 1):
        for name, module in narrow_layers(layers, groups[number], basis.weighting).items():  # the consumer in the end
            tensors = {key: value.detach().cpu() for key, value in module.named_parameters()}
            work.journal.put(NARROW, numbers[name], tensors, _NOTES)
        let_go([work.shards.folder])
        work.progress("hidden units removed", count, len(own))
    work.world.together()


def load_narrow(work: Work, plan: Plan) -> nn.Module:
    """The dense model with its narrower layers, all mapped."""
    model = load_mapped(work.shards)
    numbers = {layer.name: i for i, layer in work.ready.items()}
    for name in (name for units in plan.hidden_units for name in units.layers):
        dense: Any = model.get_submodule(name)
        model.set_submodule(name, stored_linear(work, NARROW, numbers[name], dense))
    return model


def stored_linear(work: Work, kind: str, number: int, dense: Any) -> nn.Module:
    """A narrower layer out of the journal, with the weight of that kind, in the place of ``dense``."""
    (weight,) = work.journal.some(kind, number, {"": "weight"}).values()
    bias = None
    if dense.bias is not None:
        (bias,) = work.journal.some(NARROW, number, {"": "bias"}).values()
    return narrow_layer(dense, filters_first(dense, weight), bias).requires_grad_(False)


def put_biases(work: Work, plan: Plan, others: Mapping[str, Any]) -> None:
    """What goes to the output in the place of the input's tensors: biases of fewer outputs, and ``others``."""
    numbers, changed = {layer.name: i for i, layer in work.ready.items()}, {}
    for name in (name for units in plan.hidden_units for name in units.producers):
        source = work.names.get(f"{name}.bias")
        if source is not None:
            dtype = DTYPES[work.shards.tensors[source].dtype]
            changed[source] = work.journal.get(NARROW, numbers[name])[0]["bias"].to(dtype)
    changed |= others
    if changed and work.world.first:
        put_changed(work.journal, changed)
    work.world.together()
