"""Why a layer is left out: for what it is itself, and for what the modules around it do with its weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize, prune

from ..base import LowRankLayer
from ..low_rank import Int8LowRankLinear
from ..registry import LOW_RANK, dense_type, is_table, is_transposed, oriented_weight, weight_shape
from ..shared_weights import has_plain_type, is_freed
from .stacked_experts import holds_experts, why_not_opened
from .weight_reads import readers

Ancestors = Sequence[tuple[nn.Module, str]]  # a module and the name of its child, from the model down to the layer

SHARDED = (
    "gathered weights are needed, as within deepspeed.zero.GatheredParameters or FSDP.summon_full_params, or loaded "
    "from a full state dict"
)
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HARMLESS = {
    "__init__", "__doc__", "__module__", "__annotations__", "__annotate_func__", "__annotations_cache__",
    "__static_attributes__", "__parameters__", "__orig_bases__", "__constants__", "__repr__",
    "extra_repr", "_get_name", "reset_parameters", "__firstlineno__", "__dict__", "__weakref__", "__slots__",
}  # fmt: skip
_MOVED = (
    "accelerate moves its weight about (device_map=, offload); load the model without device_map=, or take the hooks "
    "off by accelerate.hooks.remove_hook_from_module(model, recurse=True)"
)
_RECURRENT = (
    "torch runs its matrices in one packed kernel, which takes no product of two in the place of one; a step by step "
    "loop of nn.Linear layers is decomposed"
)
_NORMS = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}  # the old ones, which are hooks
_CALLS_BASE = ("lora", "ia3", "loha", "lokr", "adalora")  # of peft's layers, those whose forward calls the base layer


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks of any kind, which a replacement would drop.

    Those that torch's norms of weights leave behind when they are removed do not count: they translate old state dicts.
    """
    tables = {n: hooks for n, hooks in vars(module).items() if n.endswith("hooks") and isinstance(hooks, dict)}
    return any(not ("state_dict" in n and _is_of_norms(hook)) for n, hooks in tables.items() for hook in hooks.values())


def _is_of_norms(hook: object) -> bool:
    function = getattr(hook, "hook", hook)
    return str(getattr(function, "__module__", "")).startswith("torch.nn.utils.")


def is_quantised(module: nn.Module) -> bool:
    """Whether it is one of torch.ao's layers, which have methods in the place of parameters."""
    return type(module).__module__.startswith("torch.ao.nn.") and callable(getattr(module, "weight", None))


def structural_reason(module: nn.Module, places: Iterable[Ancestors]) -> str | None:
    """Why this module, which stands at these places, cannot be replaced whatever its values are; None if it can."""
    around = (reason for place in places if (reason := reason_around(place)))
    first = _reason_of_kind(module) or next(around, None) or _reason_of_size(module)
    return first or reason_of_hooks(module) or _reason_of_weight(module)


def _reason_of_kind(module: nn.Module) -> str | None:
    """Why its type is not decomposed."""
    dense = dense_type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript; compress the module that it was made from, then script the result"
    if type(module) is nn.Module or type(module).__module__ == "torch.export.unflatten":
        return "it is a bare module without a forward, as in exported programs; compress the model before torch.export"
    if is_quantised(module):
        return f"{type(module).__name__} is quantised by torch.ao; compress first, then quantise alds_fast.to_plain()"
    if isinstance(module, Int8LowRankLinear):
        return "its factors are int8; compress first, then alds_fast.quantize_factors(small)"
    if isinstance(module, LowRankLayer):
        known = type(module) in LOW_RANK.values()
        return None if known else f"{type(module).__name__} is a subclass of a low-rank layer"
    if holds_experts(module):
        return why_experts_stay(module) or (
            f"its {module.num_experts} experts lie in one parameter; alds_fast.open_experts(model) makes layers of them"
        )
    if dense is None and not is_transposed(module):
        names = [n for n, p in module._parameters.items() if p is not None and (_is_waiting(p) or p.dim() >= 2)]
        stays = f", its {names[0]} stays" if names else ""
        why = (
            f": {_RECURRENT}"
            if isinstance(module, nn.RNNBase | nn.RNNCellBase)
            else f"{stays}; docs/layers.md names the types that are, alds_fast.register adds yours"
        )
        return f"{type(module).__name__} is not decomposed{why}"
    if parametrize.is_parametrized(module):
        name = next(iter(module.parametrizations))  # type: ignore[arg-type]
        return f"its {name} is parametrized; parametrize.remove_parametrizations(layer, {name!r}) first"
    if _is_waiting(getattr(module, "weight", None)):
        return "its weight is not initialised yet; run one forward pass first"
    if is_table(module) and (reason := _reason_of_table(module)):
        return reason
    return None if dense is None else _reason_of_subclass(module, dense)


def _is_waiting(parameter: object) -> bool:
    """Whether it gets its shape in the first forward pass."""
    return isinstance(parameter, UninitializedParameter)


def _reason_of_table(table: Any) -> str | None:
    """What of its settings a low-rank table does not have."""
    if table.max_norm is not None:
        return "max_norm= changes its rows in every call"
    if table.sparse:
        return "its gradients are sparse; set sparse=False first"
    return "the largest of several rows is no product (mode='max')" if getattr(table, "mode", "") == "max" else None


def why_experts_stay(module: nn.Module) -> str | None:
    """Why the experts that a module holds in one parameter cannot be made layers; None if they can."""
    return why_not_opened(module) or reason_of_hooks(module)


def _reason_of_subclass(module: nn.Module, dense: type[nn.Module]) -> str | None:
    """What its class does otherwise than ``dense``."""
    if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
        return f"it is sharded by FSDP: {SHARDED}"
    between = type(module).__mro__[: type(module).__mro__.index(dense)]
    names = {name for cls in between for name in vars(cls)}
    changed = {n for n in names if hasattr(dense, n) or n.startswith("__") or n in dense.__annotations__}
    if changed & {"forward", "__call__", "_conv_forward"}:
        own = f"{type(module).__name__} is a subclass with a forward of its own"
        return f"{own}; alds_fast.register gives it a layer that computes the same"
    if changed - _HARMLESS:
        return f"{type(module).__name__} is a subclass with {', '.join(sorted(changed - _HARMLESS))} of its own"
    return None


def reader_reason(kind: str) -> str:
    """Why a layer stays dense whose weight the code of that class uses."""
    return f"the forward of {kind} computes with its weight instead of calling it"


def reason_around(place: Ancestors) -> str | None:
    """What a module that a layer lies in does with its weight."""
    if place and isinstance(place[-1][0], nn.MultiheadAttention):
        return "nn.MultiheadAttention reads this weight directly"
    of_peft = [(i, m, child) for i, (m, child) in enumerate(place) if type(m).__module__.split(".")[0] == "peft"]
    if not of_peft:
        return next(map(reader_reason, readers(place)), None)
    _, owner, child = of_peft[-1]
    names = {cls.__name__ for cls in type(owner).__mro__}
    if names & {"PeftModel", "BaseTuner", "AdaptionPromptModel"} and child in ("base_model", "model"):
        return None
    if "ParamWrapper" in names:
        return "peft adapts its weight itself (target_parameters=); merge_and_unload() the adapter first"
    if "BaseTunerLayer" not in names or child != "base_layer":
        return f"it belongs to an adapter of peft ({type(owner).__name__}), which is saved by itself"
    kind = type(owner).__module__.split(".")[2]
    if kind not in _CALLS_BASE or getattr(owner, "lora_variant", None):
        return f"peft's {kind} layers may compute with its weight; merge_and_unload() the adapter first"
    if getattr(owner, "merged_adapters", None):
        return "peft has merged an adapter into its weight; unmerge_adapter() or merge_and_unload() first"
    return None


def _reason_of_size(module: nn.Module) -> str | None:
    """Whether sharded training has left a placeholder or a flat piece in the place of its weight."""
    weight, shape = module._parameters.get("weight"), weight_shape(module)
    assert shape is not None
    if weight is not None and is_freed(weight):
        return f"the memory of its weight is freed: {SHARDED}"
    if weight is None or (weight.dim() >= 2 and (weight.numel() == 0) == (shape.numel == 0)):
        return None
    state = "flat" if weight.numel() else "empty"
    return f"its weight is {state}, {tuple(weight.shape)} in the place of {shape.weight}: {SHARDED}"


def reason_of_hooks(module: nn.Module) -> str | None:
    """What hangs on it that a replacement would drop."""
    if hasattr(module, "_hf_hook"):
        return _MOVED
    methods = {name: vars(module)[name] for name in ("forward", "_conv_forward") if name in vars(module)}
    changed = [name for name, method in methods.items() if method != getattr(type(module), name).__get__(module)]
    if changed:
        return f"it has a {changed[0]} of its own set on the instance"
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            return f"it has a pruning mask; make it permanent by prune.remove(layer, {hook._tensor_name!r}) first"
        if type(hook).__name__ in _NORMS and type(hook).__module__.startswith("torch.nn.utils."):
            return f"it has {type(hook).__name__}; torch.nn.utils.{_NORMS[type(hook).__name__]}(layer) first"
    if has_hooks(module):
        return "it has hooks, which a replacement would drop; remove them first"
    return None


def _reason_of_weight(module: nn.Module) -> str | None:
    """What is not as in a dense layer about its tensors."""
    if isinstance(module, LowRankLayer):
        return _reason_of_factors(module)
    weight, shape = module._parameters.get("weight"), weight_shape(module)
    assert shape is not None
    if weight is None:
        return f"its weight is not a parameter of it, as in a sharded model: {SHARDED}"
    if module._buffers or module._modules or not {"weight"} <= set(module._parameters) <= {"weight", "bias"}:
        return "it has parameters, buffers or modules beside weight and bias"
    bias = module._parameters.get("bias")
    if bias is not None and (bias.is_meta != weight.is_meta or bias.shape != (shape.out_channels,)):
        return f"its bias, {tuple(bias.shape)} on {bias.device}, is not there: {SHARDED}"
    if weight.dtype not in _TYPES:
        return f"its weight is {weight.dtype}, not real floating point"
    if weight.layout != torch.strided:
        return f"its weight is not dense but {weight.layout}"
    for name, tensor in module._parameters.items():
        if tensor is not None and (tensor.is_nested or not has_plain_type(tensor)):
            return f"its {name} is a {_of_another_type(tensor)}"
    if tuple(oriented_weight(module).shape) != shape.weight:
        return f"its weight has shape {tuple(oriented_weight(module).shape)}, not the {shape.weight} of its settings"
    return None if weight.numel() else "its weight is empty"


def _reason_of_factors(layer: LowRankLayer) -> str | None:
    """What is not as in a low-rank layer about its tensors."""
    if layer._modules or layer._buffers.keys() - {"order"} or set(layer._parameters) != {"encoder", "decoder", "bias"}:
        return "it has parameters, buffers or modules beside encoder, decoder and bias"
    for name in ("encoder", "decoder"):
        factor = layer._parameters[name]
        if factor is None or is_freed(factor) or not factor.numel():
            return f"its {name} is empty: {SHARDED}"
        if not has_plain_type(factor) or factor.dtype not in _TYPES:
            return f"its {name} is a {_of_another_type(factor)}"
    return None


def _of_another_type(tensor: Tensor) -> str:
    """What the tensor is, and what to do about it."""
    name, package = type(tensor).__name__, type(tensor).__module__.split(".")[0]
    if name == "DTensor":
        return f"DTensor, sharded over processes: {SHARDED}"
    if name == "FakeTensor":
        return "FakeTensor, which holds no numbers; make the model outside of FakeTensorMode"
    if package == "torchao":
        return f"{name} of torchao; compress first, then quantise"
    name = "nested tensor" if tensor.is_nested else name
    return f"{name}, not a plain tensor; compress the model before it is made one"


def reasons_text(layers: Iterable[tuple[str, str]]) -> str:
    """Why layers, each a (name, reason), are left out: every reason once, with the first name that it goes for."""
    names: dict[str, list[str]] = {}
    for name, reason in layers:
        names.setdefault(reason, []).append(name)
    parts = []
    for reason, those in sorted(names.items(), key=lambda item: -len(item[1])):
        others = f" (and {len(those) - 1} more)" if len(those) > 1 else ""
        parts.append(f"{those[0]}{others}: {reason}")
    return "; ".join(parts)
