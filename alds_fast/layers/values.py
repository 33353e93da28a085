"""Whether a model's numbers are such that they can be worked with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..errors import WeightError
from ..selection import ModuleNames, Selection, patterns
from .base import LowRankLayer
from .discovery import DecomposableLayer, Layer, decomposable, label
from .obstacles import SHARDED
from .shared_weights import has_plain_memory, is_freed

_COUNTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_whole(model: nn.Module) -> None:
    """Raise WeightError for a model that FSDP has wrapped or sharded: no run or copy of it is one of a whole model."""
    for name, module in model.named_modules():
        kinds = {cls.__name__ for cls in type(module).__mro__}
        if kinds & {"FSDPModule", "FullyShardedDataParallel"}:
            raise WeightError(
                f"{label(name)} is sharded by FSDP; load a full state dict into the model as it is without FSDP "
                f"(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), or within "
                f"FSDP.summon_full_params compress the module that FSDP wraps, model.module"
            )


def check_weight(layer: DecomposableLayer) -> None:
    """Raise WeightError unless the layer's weight has finite values."""
    if isinstance(layer.module, LowRankLayer):
        tensors = {name: getattr(layer.module, name) for name in ("encoder", "decoder")}
    else:
        tensors = {"weight": layer.module.weight}
    for name, tensor in tensors.items():
        _check_tensor(layer, name, tensor)


def _check_tensor(layer: DecomposableLayer, name: str, weight: Tensor) -> None:
    if weight.is_meta:
        raise WeightError(
            f"layer {label(layer.name)}: its {name} is on the meta device and has no values; load the weights first "
            f"(for example with load_state_dict(..., assign=True))"
        )
    weight, limit = weight.detach(), 1e150  # squares of larger values would overflow
    low, high = map(float, weight.aminmax())  # NaN if there is one
    largest = max(-low, high)
    if 0 < largest < 1 / limit:
        raise WeightError(f"layer {label(layer.name)}: its largest weight is {largest:g}, below 1e-150; scale it up")
    if not largest <= limit:
        bad = int((~(weight.double().abs() <= limit)).sum())
        raise WeightError(
            f"layer {label(layer.name)}: {bad} of {weight.numel()} weights are NaN, infinite or above 1e150; mend "
            f"them, or leave the layer out with exclude={[layer.name]!r}"
        )


def bad_values(tensor: Tensor, infinite: bool) -> int:
    """How many values are NaN or, with ``infinite``, infinite; 0 for tensors whose values cannot be looked at."""
    if not has_plain_memory(tensor) or tensor.dtype not in _COUNTED or not tensor.numel():
        return 0
    values = tensor.detach()
    low, high = values.aminmax()  # NaN if there is one
    if not bool(torch.isnan(low)) and not (infinite and bool(torch.isinf(low) | torch.isinf(high))):
        return 0
    return int((~torch.isfinite(values) if infinite else torch.isnan(values)).sum())


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor, bool]]:
    """(name, tensor, whether it is a parameter) of those that the module itself holds."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter, True
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield name, buffer, False


def check_values(model: nn.Module, layers: Sequence[Layer], exclude: Selection = None) -> None:
    """Raise WeightError, naming layer, tensor and count, for a value that would spoil the compressed model.

    That is what :func:`check_weight` refuses in layers that can be decomposed; NaN or infinity in any other parameter,
    NaN in any buffer. (Infinite buffers are legal: causal masks hold them.) Modules that ``exclude`` matches are not
    looked at.
    """
    ready = decomposable(layers)
    for layer in ready:
        check_weight(layer)
    checked = {id(layer.module.weight) for layer in ready}
    unwanted, places = patterns(exclude, "exclude") or (), ModuleNames(model)
    for prefix, module in model.named_modules():
        for name, tensor, is_parameter in () if places.match(unwanted, prefix) else _tensors(module):
            if is_freed(tensor):
                raise WeightError(f"{label(prefix)}: the memory of its {name} is freed: {SHARDED}")
            if id(tensor) not in checked and (bad := bad_values(tensor, is_parameter)):
                kind = "NaN or infinite" if is_parameter else "NaN"
                raise WeightError(
                    f"{label(prefix)}: {bad} of {tensor.numel()} values of its {name} are {kind}; mend them, as the "
                    f"compressed model would give NaN as the model does"
                )
