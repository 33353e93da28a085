"""Put layers in the place of others, in a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from ..errors import ModelError
from .base import LowRankLayer
from .shared_weights import copy_shared_memory


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


def _is_changed(module: nn.Module) -> bool:
    """Whether it is an encoder layer of torch, one of whose linear layers is low-rank or in its plain form."""
    children = list(module.children()) if isinstance(module, nn.TransformerEncoderLayer) else []
    return any(isinstance(m, LowRankLayer | nn.Sequential) for m in children)


def _leave_fast_path(model: nn.Module) -> None:
    """Keep torch's transformer layers off their fused inference path, which reads the dense weights by name."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _is_changed(module):
            vars(module).setdefault("alds_fast_path", module.activation_relu_or_gelu)
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, LowRankLayer) or _is_changed(m) for m in module.modules()
        ):
            vars(module).setdefault("alds_fast_path", module.use_nested_tensor)
            module.use_nested_tensor = False
