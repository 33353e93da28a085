"""Low-rank layers in models of transformers that are about to be loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import PlanError
from ..layers import (
    Layer,
    OpenedExperts,
    find_layers,
    holds_experts,
    label,
    put_narrowed,
    put_opened,
    why_experts_stay,
)
from .stored_layers import layer_of_fields
from .transformers_keys import stored_names


def set_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of another one."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


def put_opened_experts(model: nn.Module) -> None:
    """Open, in place, all mixtures of experts that can be, in a model that is about to be loaded."""
    for name, module in list(model.named_modules()):
        if holds_experts(module) and why_experts_stay(module) is None:
            set_module(model, name, OpenedExperts(module))


def stack_opened_experts(model: nn.Module) -> None:
    """Put the modules that were opened, with the weights as they are, in the places of opened experts."""
    for name, module in list(model.named_modules()):
        if isinstance(module, OpenedExperts):
            set_module(model, name, module.stacked())


def put_low_rank_layers(
    model: nn.Module, layers: Mapping[str, Mapping[str, Any]], narrowed: Mapping[str, Mapping[str, Any]]
) -> None:
    """Put empty low-rank layers, and narrower ones, on the meta device, in a transformers model about to be loaded.

    The model may be a part of the one that was compressed, or have another head; layers that it does not have, or has
    in another size, are left out. Raises PlanError if a layer cannot be replaced, or if all are left out though some
    look like the model's.
    """
    put_opened(model, {**layers, **narrowed})
    dense_layers = {layer.name: layer for layer in find_layers(model)}
    if narrowed:
        places = _places(model, dense_layers, narrowed)
        here = {name: narrowed[stored] for stored, name in places.items()}
        here = {name: of for name, of in here.items() if list(dense_layers[name].weight) == list(of["dense_shape"])}
        put_narrowed(model, here)
        dense_layers = {layer.name: layer for layer in find_layers(model)}
    places = _places(model, dense_layers, layers)
    unknown = [stored for stored in layers if stored not in places]
    new = {name: stored for stored, name in places.items()
           if list(dense_layers[name].weight) == list(layers[stored]["shape"])}  # fmt: skip
    for name, stored in new.items():
        _replace(model, dense_layers[name], stored, layers[stored])
    _expect_marks(model, [*new, *new.values()])
    if not new and not narrowed:
        _check_names(type(model).__name__, list(dense_layers), unknown)


def _places(model: nn.Module, dense_layers: Mapping[str, Layer], layers: Iterable[str]) -> dict[str, str]:
    """Which layer of the model each stored one is, by its stored name."""
    prefix, stored_layers = getattr(model, "base_model_prefix", ""), list(layers)
    by_target, _ = stored_names(model, [f"{name}.weight" for name in stored_layers])
    renamed = {stored.removesuffix(".weight"): target.removesuffix(".weight") for target, stored in by_target.items()}
    places = {}
    for stored in stored_layers:
        names = [renamed.get(stored, stored), stored, stored.removeprefix(f"{prefix}."), f"{prefix}.{stored}"]
        name = next((n for n in names if n in dense_layers), None)
        if name is not None:
            places[stored] = name
    return places


def _replace(model: nn.Module, layer: Layer, stored: str, fields: Mapping[str, Any]) -> None:
    if layer.reason is not None:
        raise PlanError(f"the checkpoint's layer {label(stored)} cannot be replaced: {layer.reason}")
    weight = layer.module.weight
    assert isinstance(weight, Tensor)
    low = layer_of_fields(layer.module, fields)
    set_module(model, layer.name, low.to(weight.dtype).requires_grad_(weight.requires_grad))


def _expect_marks(model: Any, names: Iterable[str]) -> None:
    """Let transformers pass over what stands in a file in the place of the dense weights, without a word."""
    marks = {rf"(^|\.){re.escape(name)}\.weight$" for name in names}
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *marks}


def _check_names(kind: str, names: Iterable[str], unknown: Iterable[str]) -> None:
    """PlanError if a stored layer that the model lacks ends as one of the model's does."""
    ends = {_end(name): name for name in names}
    alike = next((stored for stored in unknown if _end(stored) in ends), None)
    if alike is not None:
        raise PlanError(
            f"the checkpoint's layer {label(alike)} is not in {kind}, whose layer {label(ends[_end(alike)])} may be "
            f"meant; load the class that was compressed"
        )


def _end(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")[-3:])
