"""Put low-rank layers in the place of dense ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from ..linalg import WeightShape
from .base import LowRankLayer, LowRankLinear
from .conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .shared_weights import copy_shared_memory


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


def weight_shape(module: nn.Module) -> WeightShape | None:
    """The weight shape of a Linear or ``nn.Conv1d/2d/3d`` (subclasses included), None for anything else."""
    return _shape_of(module) if isinstance(module, tuple(LOW_RANK)) or is_transposed(module) else None


def low_rank_like(module: nn.Module, scheme: int, groups: int, rank: int) -> LowRankLayer:
    """The low-rank layer that replaces ``module``, with its factors on the meta device and its bias not copied yet."""
    shape, bias = _shape_of(module), getattr(module, "bias", None) is not None
    options: dict[str, Any] = {"scheme": scheme, "groups": groups, "bias": bias, "device": "meta"}
    if is_linear(module):
        return LowRankLinear(shape.in_channels, shape.out_channels, rank, **options).train(module.training)
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    for name in ("stride", "padding", "dilation", "padding_mode"):
        options[name] = getattr(module, name)
    cls: Any = LOW_RANK[type(module)]
    layer = cls(shape.in_channels, shape.out_channels, shape.kernel, rank, conv_groups=shape.conv_groups, **options)
    return layer.train(module.training)


def replace_layers(model: nn.Module, new: Mapping[str, nn.Module]) -> nn.Module:
    """A deep copy of the model in which the named layers are the new ones, wherever they are used; biases are copied
    along.

    The dense weights are not copied on the way. Raises ModelError if the model cannot be deep-copied.
    """
    modules = dict(model.named_modules())
    memo: dict[int, object] = {}
    try:
        copy_shared_memory(model, memo)
        for name, layer in new.items():
            if modules[name].bias is not None and hasattr(layer, "bias"):
                layer.bias = copy.deepcopy(modules[name].bias, memo)
            memo[id(modules[name])] = layer
        result = copy.deepcopy(model, memo)
    except Exception as e:
        raise ModelError(f"the model cannot be deep-copied ({e}); the compressed model is built from a copy") from e
    _return_to_fast_path(result)
    _leave_fast_path(result)
    return result


def _return_to_fast_path(model: nn.Module) -> None:
    """Undo :func:`_leave_fast_path`."""
    for module in model.modules():
        if hasattr(module, "alds_fast_path"):
            encoder = isinstance(module, nn.TransformerEncoder)
            flag = "use_nested_tensor" if encoder else "activation_relu_or_gelu"
            vars(module)[flag] = vars(module).pop("alds_fast_path")


def _leave_fast_path(model: nn.Module) -> None:
    """Keep torch's transformer layers off their fused inference path, which reads the dense weights by name."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(m, LowRankLayer) for m in module.children()
        ):
            vars(module).setdefault("alds_fast_path", module.activation_relu_or_gelu)
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, LowRankLayer) for m in module.modules()):
            vars(module).setdefault("alds_fast_path", module.use_nested_tensor)
            module.use_nested_tensor = False
