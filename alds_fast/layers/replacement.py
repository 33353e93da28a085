"""Put layers in the place of others, in a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from ..linalg import Decomposition
from .absent_weight import AbsentWeight
from .base import LowRankLayer
from .discovery import decomposable, find_layers, label
from .obstacles import attributes, uncopied
from .registry import is_narrowed, low_rank_like
from .shared_weights import copy_shared_memory, has_plain_type
from .values import check_whole

_COPYING = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__")


def _tensors(model: nn.Module) -> list[Tensor]:
    """Every tensor that hangs on the model, parameters and buffers included."""
    return [value for _, value in attributes(model) if isinstance(value, Tensor)]


def _shallow(tensor: Tensor) -> Tensor:
    """Another tensor of the same memory, outside of any graph."""
    if not has_plain_type(tensor) or tensor.is_inference():
        return tensor
    shallow = tensor.detach()
    return nn.Parameter(shallow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shallow


def _copy(model: nn.Module, memo: dict[int, Any], new: Mapping[str, nn.Module]) -> nn.Module:
    """A deep copy with that memo; ModelError where it fails, or where it lacks the new layers."""
    try:
        result = copy.deepcopy(model, memo)
    except Exception as e:
        shallow = {id(t): _shallow(t) for t in _tensors(model)}
        path, part = uncopied("model", model, shallow)
        cause = str(e).partition("\n")[0]
        raise ModelError(
            f"the model cannot be deep-copied ({cause}), for {path}, a {type(part).__name__}; the "
            f"compressed model is built from a copy: take it off the model for the call, and put it on the result"
        ) from e
    inside = {id(module) for module in result.modules()}
    for name, layer in new.items():
        if id(layer) not in inside:
            raise ModelError(_why_not_inside(model, name))
    return result


def _why_not_inside(model: nn.Module, name: str) -> str:
    """Which class around the layer makes its copies in its own way."""
    path = ["", *(".".join(name.split(".")[: i + 1]) for i in range(name.count(".") + 1))]
    for place in path if name else [""]:
        for cls in type(model.get_submodule(place)).__mro__:
            methods = [method for method in _COPYING if method in vars(cls)]
            if methods and cls not in nn.Module.__mro__:
                return (
                    f"{label(place)}: {cls.__name__} has a {methods[0]} of its own, which does not take layer "
                    f"{label(name)} over from copy.deepcopy's memo; let it copy its parts by copy.deepcopy(part, memo)"
                )
    return f"layer {label(name)} is not in a deep copy of the model, so that it cannot be replaced"


def check_copyable(model: nn.Module) -> None:
    """ModelError, naming attribute or class, unless the model can be deep-copied with other layers in it.

    No weight is copied for the answer. A model without a layer that can be decomposed is not looked at, but for how it
    is sharded.
    """
    layers = decomposable(find_layers(model))
    check_whole(model)
    if not layers:
        return
    memo: dict[int, Any] = {id(t): _shallow(t) for t in _tensors(model)}
    new = {layer.name: low_rank_like(layer.module, Decomposition(0, 1, 1)) for layer in layers}
    _copy(model, memo | {id(layer.module): new[layer.name] for layer in layers}, new)


def replace_layers(model: nn.Module, new: Mapping[str, nn.Module], *, share: bool = False) -> nn.Module:
    """A deep copy of the model in which the named layers are the new ones, wherever they are used; biases are copied
    along, but for layers that lost outputs or inputs.

    The dense weights are not copied on the way. Tensors that stand in a graph (activations that a model keeps, weights
    under a pruning mask) are copied outside of it. With ``share`` no tensor is copied: the copy holds the model's own.
    Raises ModelError if the model cannot be deep-copied, or makes its copies in a way of its own that drops the new
    layers.
    """
    modules = dict(model.named_modules())
    memo: dict[int, Any] = {id(t): t for t in _tensors(model)} if share else {}
    if not share:
        memo |= {id(t): t.detach().clone() for t in _tensors(model) if not t.is_leaf}
        copy_shared_memory(model, memo)
    for name, layer in new.items():
        bias = getattr(modules[name], "bias", None)
        if bias is not None and hasattr(layer, "bias") and not is_narrowed(layer):  # which brings its own
            layer.bias = copy.deepcopy(bias, memo)
        memo[id(modules[name])] = layer
    result = _copy(model, memo, new)
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
    """Whether it is an encoder layer of torch, a linear layer of which is low-rank or in its plain form, or whose
    attention is opened.
    """
    children = list(module.children()) if isinstance(module, nn.TransformerEncoderLayer) else []
    opened = any(isinstance(getattr(m, "in_proj_weight", None), AbsentWeight) for m in children)
    return opened or any(isinstance(m, LowRankLayer | nn.Sequential) for m in children)


def _leave_fast_path(model: nn.Module) -> None:
    """Keep torch's transformer layers off their fused inference path, which reads the dense weights by name.

    All of an encoder that packs padded sequences: unpacked, a sequence that is padded as a whole is NaN on that path.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _is_changed(module):
            _off(module, "activation_relu_or_gelu", 0)
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, LowRankLayer) or _is_changed(m) for m in module.modules()
        ):
            layers = module.layers if vars(module).get("alds_fast_path", module.use_nested_tensor) else ()
            for layer in (m for m in layers if isinstance(m, nn.TransformerEncoderLayer)):
                _off(layer, "activation_relu_or_gelu", 0)
            _off(module, "use_nested_tensor", False)


def _off(module: nn.Module, flag: str, value: Any) -> None:
    """Change the flag, and keep what it was."""
    vars(module).setdefault("alds_fast_path", getattr(module, flag))
    setattr(module, flag, value)


def annotate(model: nn.Module, **notes: Any) -> None:
    """Hang notes on a model, as ``model.alds_NAME``, past whatever ``__setattr__`` its class has."""
    for name, value in notes.items():
        object.__setattr__(model, f"alds_{name}", value)
