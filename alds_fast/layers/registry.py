"""The types of layers: their weights, their shapes, and the low-rank form of each."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..linalg import Decomposition, WeightShape
from .base import LowRankLayer
from .conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .linear import LowRankLinear

_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)


def is_transposed(module: nn.Module) -> bool:
    """Whether it is a Conv1D of transformers (GPT-2's Linear, whose weight is stored as (inputs, outputs))."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module) -> bool:
    """Whether it multiplies the last dimension of its input with a matrix."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def oriented_weight(module: nn.Module) -> Tensor:
    """A layer's weight with the filters first, (out_channels, in_channels / conv_groups, *kernel), detached."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().mT if is_transposed(module) else weight.detach()


def _shape_of(module: nn.Module) -> WeightShape:
    if isinstance(module, nn.Linear):
        return WeightShape(module.out_features, module.in_features)
    if is_transposed(module):
        conv1d: Any = module
        return WeightShape(conv1d.nf, conv1d.nx)
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return WeightShape(module.out_channels, module.in_channels, tuple(module.kernel_size), module.groups)


LOW_RANK: dict[type[nn.Module], type[LowRankLayer]] = {
    nn.Linear: LowRankLinear,
    nn.Conv1d: LowRankConv1d,
    nn.Conv2d: LowRankConv2d,
    nn.Conv3d: LowRankConv3d,
}


def dense_type(module: nn.Module) -> type[nn.Module] | None:
    """Which of the types in ``LOW_RANK`` the module is, or is a subclass of; None for anything else."""
    return next((cls for cls in LOW_RANK if isinstance(module, cls)), None)


def weight_shape(module: nn.Module) -> WeightShape | None:
    """The weight shape of a Linear or ``nn.Conv1d/2d/3d`` (subclasses included), None for anything else."""
    return _shape_of(module) if dense_type(module) or is_transposed(module) else None


def low_rank_like(module: nn.Module, decomposition: Decomposition) -> LowRankLayer:
    """The low-rank layer that replaces ``module``, with its factors on the meta device and its bias not copied yet.

    Numbers, texts and containers of these that somebody has set on the module, or that a subclass declares, are on it
    too.
    """
    layer = _like(module, decomposition)
    for name, value in _own_values(module).items():
        if not hasattr(layer, name):
            setattr(layer, name, copy.deepcopy(value))
    return layer


def _own_values(module: nn.Module) -> dict[str, Any]:
    """Plain values by name, among them those of its type in torch."""
    kinds = type(module).__mro__[: type(module).__mro__.index(dense)] if (dense := dense_type(module)) else ()
    values = {name: value for cls in reversed(kinds) for name, value in vars(cls).items()} | vars(module)
    return {
        name: value for name, value in values.items()
        if name[:1] != "_" and all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(value))
    }  # fmt: skip


def _like(module: nn.Module, decomposition: Decomposition) -> LowRankLayer:
    if is_linear(module):
        shape, bias = _shape_of(module), getattr(module, "bias", None) is not None
        options: dict[str, Any] = {**decomposition.to_dict(), "bias": bias, "device": "meta"}
        return LowRankLinear(shape.in_channels, shape.out_channels, **options).train(module.training)
    dense = dense_type(module)
    assert dense is not None
    cls: Any = LOW_RANK[dense]
    layer: LowRankLayer = cls.shaped_like(module, decomposition)
    return layer.train(module.training)
