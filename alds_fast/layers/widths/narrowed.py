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
from ..linear import LowRankLinear
from ..registry import DENSE_SHAPE, dense_shape, own_values
from ..replacement import replace_layers

Sizes = Mapping[str, Mapping[str, Sequence[int]]]  # by layer "shape" and "dense_shape", (outputs, inputs) each


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear itself, of no subclass: outputs and inputs of others may mean something."""
    return type(module) is nn.Linear


def narrow_layer(module: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer like ``module`` of another weight (outputs, inputs) and bias, which it takes over."""
    new = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta").train(module.training)
    for name, value in own_values(module).items():
        if name not in vars(new):
            setattr(new, name, copy.deepcopy(value))
    for name, value in (("weight", weight), ("bias", bias)):
        old: Any = getattr(module, name)
        if value is not None:
            setattr(new, name, nn.Parameter(value, old.requires_grad))
    if dense_shape(new) is None:
        setattr(new, DENSE_SHAPE, (module.out_features, module.in_features))
    return new


def as_narrowed(layer: DecomposableLayer, module: nn.Linear) -> DecomposableLayer:
    """The layer with another module, of other sizes, in its place."""
    shape = WeightShape(module.out_features, module.in_features)
    own = {"weight": tuple(module.weight.shape), "shape": shape, "params": sum(p.numel() for p in module.parameters())}
    return replace(layer, **own, module=module)  # type: ignore[arg-type]


def narrowed_sizes(model: nn.Module) -> dict[str, dict[str, list[int]]]:
    """By name of a layer that lost outputs or inputs, low-rank or not, its "shape" and its "dense_shape"."""
    sizes = {}
    for name, module in model.named_modules():
        before = dense_shape(module) if isinstance(module, nn.Linear | LowRankLinear) else None
        if before is not None:
            sizes[name] = {"shape": [module.out_features, module.in_features], "dense_shape": list(before)}
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


def _empty(layer: Any, name: str, of: Mapping[str, Sequence[int]]) -> nn.Linear:
    if not isinstance(layer, DecomposableLayer) or not is_plain_linear(layer.module):
        why = layer.reason if layer is not None and layer.reason else "the model has no such nn.Linear"
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
def padded(module: nn.Linear) -> nn.Linear:
    """The layer with zeros in the places of the outputs and inputs that it lost, at the end.

    A pair of layers around hidden units computes the same with all of them padded.
    """
    before = dense_shape(module)
    if before is None:
        return module
    weight = module.weight.new_zeros(before)
    weight[: module.out_features, : module.in_features] = module.weight
    bias = None if module.bias is None else module.bias.new_zeros(before[0])
    if bias is not None:
        bias[: module.out_features] = module.bias
    new = narrow_layer(module, weight, bias)
    delattr(new, DENSE_SHAPE)
    return new
