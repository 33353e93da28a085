"""Layers of torch whose weight is made out of others in every call, with that weight in their place.

These are weight norms, the hook and the parametrization, and the standardised convolutions of timm, by their names.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..obstacles import reason_of_hooks
from ..registry import dense_type

_STANDARDISED = {"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"}


def of_timm(module: nn.Module, names: set[str]) -> bool:
    """Whether it is one of these classes of timm."""
    return type(module).__name__ in names and type(module).__module__.split(".")[0] == "timm"


def _norm_hook(module: nn.Module) -> Any:
    """The hook of ``torch.nn.utils.weight_norm`` on the weight, None without any."""
    hooks = (hook for hook in module._forward_pre_hooks.values() if type(hook).__name__ == "WeightNorm")
    return next((hook for hook in hooks if type(hook).__module__ == "torch.nn.utils.weight_norm"), None)


def has_weight_norm(module: nn.Module) -> bool:
    """Whether the weight of one of torch's layers has a weight norm, old or new, and nothing else is parametrized."""
    if dense_type(module) is None:
        return False
    if not parametrize.is_parametrized(module):
        hook = _norm_hook(module)
        return hook is not None and hook.name == "weight"
    tables: Any = module.parametrizations
    kinds = [type(part).__name__ for part in tables["weight"]] if set(tables) == {"weight"} else []
    return kinds == ["_WeightNorm"]


def why_norm_stays(module: nn.Module) -> str | None:
    """Why the weight norm of a layer is not folded into its weight; None if it can be."""
    hook = _norm_hook(module)
    if hook is None:
        return reason_of_hooks(module)
    others = [other for other in module._forward_pre_hooks.values() if other is not hook]
    return "it has hooks beside its weight norm; remove them first" if others or module._forward_hooks else None


def without_norm(module: nn.Module) -> nn.Module:
    """The layer with the weight that its norm gives."""
    hook = _norm_hook(module)
    weight: Any = module.weight if hook is None else hook.compute_weight(module)
    kind = type(module) if hook is not None else type(module).__mro__[1]
    return with_weight(module, kind, weight)


def with_weight(module: nn.Module, kind: type[nn.Module], weight: Tensor) -> nn.Module:
    """A module of that kind, with the attributes and the bias of this one and another weight."""
    plain = kind.__new__(kind)
    bias: Any = module.bias
    trained = any(p.requires_grad for p in module.parameters() if p is not bias)
    parameters = {"weight": nn.Parameter(weight.detach(), trained), "bias": bias}
    empty: dict[str, Any] = {"_modules": {}, "_forward_pre_hooks": OrderedDict()}
    vars(plain).update({n: v for n, v in vars(module).items() if n != "weight"} | {"_parameters": parameters} | empty)
    return plain


def with_parameters(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A module of that kind with the attributes and the very parameters of this one."""
    plain: Any = with_weight(module, kind, module.weight)  # type: ignore[arg-type]
    plain.weight = module.weight
    return plain


def is_standardised(module: nn.Module) -> bool:
    """Whether it is a convolution of timm that standardises its weight."""
    return of_timm(module, _STANDARDISED)


def with_standardised_weight(module: nn.Module) -> nn.Module:
    """The convolution with its weight standardised: mean 0 and variance 1 in every filter, times a gain, if any."""
    conv: Any = module
    gain = (conv.gain * conv.scale).view(-1) if hasattr(conv, "gain") else None
    filters = conv.weight.reshape(1, conv.out_channels, -1)
    weight = F.batch_norm(filters, None, None, weight=gain, training=True, momentum=0.0, eps=conv.eps)
    return with_weight(conv, nn.Conv2d, weight.reshape_as(conv.weight))
