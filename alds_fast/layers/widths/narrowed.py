"""Linear layers of fewer outputs or inputs than the model's own, and what says so."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PlanError
from ...linalg import WeightShape
from ..discovery import DecomposableLayer, find_layers, label
from ..registry import (
    DENSE_SHAPE,
    dense_shape,
    filters_first,
    is_transposed,
    oriented_weight,
    own_values,
    weight_shape,
)
from ..replacement import replace_layers

Sizes = Mapping[str, Mapping[str, Sequence[int]]]  # by layer "shape" and "dense_shape", (outputs, inputs) each


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear itself, or transformers' Conv1D: what others' outputs and inputs mean is not known."""
    return type(module) is nn.Linear or is_transposed(module)


def narrow_layer(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer like ``module`` of another weight (outputs, inputs) and bias, which it takes over."""
    outputs, inputs = weight.shape
    with torch.device("meta"):
        kind: Any = type(module)
        new = kind(outputs, inputs) if is_transposed(module) else nn.Linear(inputs, outputs, bias is not None)
    new.train(module.training)
    for name, value in own_values(module).items():
        if name not in vars(new):
            setattr(new, name, copy.deepcopy(value))
    for name, value in (("weight", filters_first(module, weight).contiguous()), ("bias", bias)):
        old: Any = getattr(module, name)
        if value is not None:
            setattr(new, name, nn.Parameter(value, old.requires_grad))
    if dense_shape(new) is None:
        setattr(new, DENSE_SHAPE, tuple(oriented_weight(module).shape))
    return new


def as_narrowed(layer: DecomposableLayer, module: nn.Module) -> DecomposableLayer:
    """The layer with another module, of other sizes, in its place."""
    outputs, inputs = oriented_weight(module).shape
    own = {"weight": (outputs, inputs), "shape": WeightShape(outputs, inputs)}
    return replace(layer, **own, params=sum(p.numel() for p in module.parameters()), module=module)  # type: ignore[arg-type]


def narrowed_sizes(model: nn.Module) -> dict[str, dict[str, list[int]]]:
    """By name of a layer that lost outputs or inputs, low-rank or not, its "shape" and its "dense_shape"."""
    sizes = {}
    for name, module in model.named_modules():
        before, shape = dense_shape(module), weight_shape(module)
        if before is not None and shape is not None:
            sizes[name] = {"shape": list(shape.weight), "dense_shape": list(before)}
    return sizes


def with_sizes(model: nn.Module, sizes: Sizes) -> nn.Module:
    """A copy of the model with empty layers of these sizes, on the meta device, that shares all else with it.

    The model itself where there are none. PlanError for a layer that it does not have, or has in another size.
    """
    if not sizes:
        return model
    layers = {layer.name: layer for layer in find_layers(model)}
    return replace_layers(model, {name: _empty(layers.get(name), name, of) for name, of in sizes.items()}, share=True)


def put_narrowed(model: nn.Module, sizes: Sizes) -> None:
    """As :func:`with_sizes`, in the model itself, which is about to be loaded."""
    layers = {layer.name: layer for layer in find_layers(model)} if sizes else {}
    for name, of in sizes.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, _empty(layers.get(name), name, of))


def _empty(layer: Any, name: str, of: Mapping[str, Sequence[int]]) -> nn.Module:
    if not isinstance(layer, DecomposableLayer) or not is_plain_linear(layer.module):
        why = layer.reason if layer is not None and layer.reason else "the model has no such linear layer"
        raise PlanError(f"layer {label(name)} lost hidden units in the file, and cannot here: {why}")
    module: Any = layer.module
    if list(layer.weight) != list(of["dense_shape"]):
        raise PlanError(
            f"layer {label(name)}: the file is of a model with weight shape {tuple(of['dense_shape'])}, the model has "
            f"{layer.weight}"
        )
    outputs, inputs = of["shape"]
    if not (0 < outputs <= of["dense_shape"][0] and 0 < inputs <= of["dense_shape"][1]):
        raise PlanError(f"layer {label(name)}: {tuple(of['shape'])} is no part of shape {tuple(of['dense_shape'])}")
    kind = {"device": "meta", "dtype": module.weight.dtype}
    bias = None if module.bias is None else torch.empty(outputs, **kind)
    return narrow_layer(module, torch.empty(outputs, inputs, **kind), bias)


@torch.no_grad()
def padded(module: nn.Module) -> nn.Module:
    """The layer with zeros in the places of the outputs and inputs that it lost, at the end.

    A pair of layers around hidden units computes the same with all of them padded.
    """
    before = dense_shape(module)
    if before is None:
        return module
    left, old = oriented_weight(module), module.bias
    weight = left.new_zeros(before)
    weight[: left.shape[0], : left.shape[1]] = left
    bias = None
    if isinstance(old, Tensor):
        bias = old.new_zeros(before[0])
        bias[: len(old)] = old
    new = narrow_layer(module, weight, bias)
    delattr(new, DENSE_SHAPE)
    return new
