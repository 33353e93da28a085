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
from .low_rank import (
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
    LowRankEmbedding,
    LowRankEmbeddingBag,
    swap_channels,
)

STORED = "_alds_stored"  # set on a layer that stands for a module with more parameters, its bias aside
DENSE_SHAPE = "dense_shape"  # set on a linear layer: (outputs, inputs) that it had before it lost some
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)


def is_transposed(module: nn.Module) -> bool:
    """Whether it is a Conv1D of transformers (GPT-2's Linear, whose weight is stored as (inputs, outputs))."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def dense_shape(module: nn.Module) -> tuple[int, int] | None:
    """(outputs, inputs) that a linear layer had before some were removed; None where none were."""
    shape = vars(module).get(DENSE_SHAPE)
    return None if shape is None else (int(shape[0]), int(shape[1]))


def is_narrowed(module: nn.Module) -> bool:
    """Whether it is a dense layer that lost outputs or inputs."""
    return (isinstance(module, nn.Linear) or is_transposed(module)) and dense_shape(module) is not None


def is_table(module: nn.Module) -> bool:
    """Whether rows are looked up in its weight."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag | LowRankEmbedding)


def is_linear(module: nn.Module) -> bool:
    """Whether it multiplies the last dimension of its input with a matrix; tables are not meant."""
    return isinstance(module, nn.Linear | LowRankLinear) or is_transposed(module)


def oriented_weight(module: nn.Module) -> Tensor:
    """A layer's weight with the filters first, (out_channels, in_channels / conv_groups, *kernel), detached."""
    if isinstance(module, LowRankLayer):
        return module.dense_weight().detach()
    weight = module.weight
    assert isinstance(weight, Tensor)
    return filters_first(module, weight.detach())


def filters_first(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight, or one of its shape, with the filters first."""
    if isinstance(module, TRANSPOSED):
        return swap_channels(weight, module.groups)
    return weight.mT if is_transposed(module) or is_table(module) else weight


def _shape_of(module: nn.Module) -> WeightShape:
    if isinstance(module, nn.Linear):
        return WeightShape(module.out_features, module.in_features)
    if is_transposed(module):
        conv1d: Any = module
        return WeightShape(conv1d.nf, conv1d.nx)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return WeightShape(module.embedding_dim, module.num_embeddings)
    assert isinstance(module, CONVOLUTIONS)
    return WeightShape(module.out_channels, module.in_channels, tuple(module.kernel_size), module.groups)


LOW_RANK: dict[type[nn.Module], type[LowRankLayer]] = {
    nn.Linear: LowRankLinear,
    nn.Conv1d: LowRankConv1d,
    nn.Conv2d: LowRankConv2d,
    nn.Conv3d: LowRankConv3d,
    nn.ConvTranspose1d: LowRankConvTranspose1d,
    nn.ConvTranspose2d: LowRankConvTranspose2d,
    nn.ConvTranspose3d: LowRankConvTranspose3d,
    nn.Embedding: LowRankEmbedding,
    nn.EmbeddingBag: LowRankEmbeddingBag,
}


def dense_type(module: nn.Module) -> type[nn.Module] | None:
    """Which of the types in ``LOW_RANK`` the module is, or is a subclass of; None for anything else."""
    return next((cls for cls in LOW_RANK if isinstance(module, cls)), None)


def weight_shape(module: nn.Module) -> WeightShape | None:
    """The weight shape of a Linear or convolution, transposed or not, subclasses and low-rank ones included."""
    if isinstance(module, LowRankLayer):
        return module.weight_shape
    return _shape_of(module) if dense_type(module) or is_transposed(module) else None


def stored_params(module: nn.Module) -> int:
    """Parameters, beside the bias, that go when a low-rank layer takes the place of the layer."""
    shape = weight_shape(module)
    assert shape is not None
    if isinstance(module, LowRankLayer):
        return module.decomposition.params(shape)
    stored: int = vars(module).get(STORED, shape.numel)
    return stored


def low_rank_like(module: nn.Module, decomposition: Decomposition) -> LowRankLayer:
    """The low-rank layer that replaces ``module``, with its factors on the meta device and its bias not copied yet.

    Numbers, texts and containers of these that somebody has set on the module, or that a subclass declares, are on it
    too.
    """
    layer = _like(module, decomposition)
    for name, value in own_values(module).items():
        if not hasattr(layer, name):
            setattr(layer, name, copy.deepcopy(value))
    return layer


def own_values(module: nn.Module) -> dict[str, Any]:
    """Plain values that somebody has set on a module or its class, by name, among them those of its type in torch."""
    kinds = type(module).__mro__[: type(module).__mro__.index(dense)] if (dense := dense_type(module)) else ()
    values = {name: value for cls in reversed(kinds) for name, value in vars(cls).items()} | vars(module)
    return {
        name: value for name, value in values.items()
        if name[:1] != "_" and all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(value))
    }  # fmt: skip


def _like(module: nn.Module, decomposition: Decomposition) -> LowRankLayer:
    if is_linear(module):
        shape, bias = weight_shape(module), getattr(module, "bias", None) is not None
        assert shape is not None
        options: dict[str, Any] = {**decomposition.to_dict(), "bias": bias, "device": "meta"}
        return LowRankLinear(shape.in_channels, shape.out_channels, **options).train(module.training)
    dense = dense_type(module)
    cls: Any = type(module) if dense is None else LOW_RANK[dense]
    layer: LowRankLayer = cls.shaped_like(module, decomposition)
    return layer.train(module.training)
