"""Compressed models in modules of torch's own, for tools that know no others."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn
from torch.nn.utils import parametrize

from ..checks import check_model
from ..errors import ModelError
from ..layers import (
    LOW_RANK,
    Int8LowRankLinear,
    LowRankLayer,
    MergedLinears,
    has_hooks,
    is_narrowed,
    label,
    replace_layers,
    tied_names,
)
from .plain_modules import plain_module


def to_plain(model: nn.Module) -> nn.Module:
    """A copy of a compressed model in which every low-rank layer is made of torch's own modules.

    A low-rank layer becomes an ``nn.Sequential`` of ``encoder`` and ``decoder``, each an ``nn.Linear`` or
    ``nn.Conv1d``, 2d or 3d. The encoder of a linear layer with slices is one small ``nn.Linear`` for each slice; pivots
    are passed on around one of the two. So
    torch.fx, torch.jit.script, quantisation, adapters and exporters see what they know. Outputs are equal up to
    rounding. Parameters keep their type, device and ``requires_grad``; tied ones stay tied. Attributes of the dense
    layer, such as ``in_features``, stay readable.

    The copy is for tools, not for files of this library: save the compressed model, and call this after loading it.

    Args:
        model: a model with low-rank layers; it is not changed.

    Returns:
        The copy.

    Raises:
        ModelError: there is no low-rank layer, a layer was merged by deploy, or one has hooks, parametrizations,
            adapters or a forward of its own, which the plain form would drop. The message names the layer.

    >>> import torch, alds_fast as alds
    >>> plain = to_plain(alds.LowRankLinear(64, 32, rank=4))
    >>> plain
    Sequential(
      (encoder): Linear(in_features=64, out_features=4, bias=False)
      (decoder): Linear(in_features=4, out_features=32, bias=True)
    )
    """
    check_model(model)
    _check_layers(model)
    result = replace_layers(model, {})
    if isinstance(result, LowRankLayer):
        return plain_module(result)
    plain = {id(m): plain_module(m) for m in result.modules() if isinstance(m, LowRankLayer)}
    for parent in list(result.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = plain.get(id(child), child)
    _forget_formats(result)
    return result


def _check_layers(model: nn.Module) -> None:
    """ModelError unless every low-rank layer has a plain form, and there is one."""
    tied, low = tied_names(model), False
    for name, module in model.named_modules():
        if isinstance(module, MergedLinears):
            raise ModelError(
                f"{label(name)}: layers merged by deploy have no plain form; pass the model that was given to deploy"
            )
        if isinstance(module._modules.get("base_layer"), LowRankLayer):
            raise ModelError(
                f"{label(name)}: {type(module).__name__} holds an adapter of a low-rank layer; merge or unload the "
                f"adapters first, or add them to the plain form"
            )
        low |= isinstance(module, LowRankLayer) or is_narrowed(module)
        if isinstance(module, LowRankLayer) and (reason := _why_not_plain(module, tied)) is not None:
            raise ModelError(f"layer {label(name)} has no plain form: {reason}")
    if not low:
        raise ModelError("the model has no low-rank layer; pass one made by compress(), Plan.apply() or load()")


def _why_not_plain(layer: LowRankLayer, tied: dict[int, list[str]]) -> str | None:
    """What of this layer the plain form would drop, and what to do; None if nothing."""
    if parametrize.is_parametrized(layer):
        return "it is parametrized; remove the parametrization first (torch.nn.utils.parametrize)"
    if isinstance(layer, Int8LowRankLinear):
        return "its factors are int8; take the plain form of the model that was quantised"
    if type(layer) not in LOW_RANK.values():
        return f"{type(layer).__name__} is a subclass; use the class that it is made of"
    if "forward" in vars(layer):
        return "it has a forward of its own set on the instance (as device maps of accelerate do); remove it first"
    if has_hooks(layer):
        return "it has hooks, which the plain form would drop; remove them first"
    if layer._modules or layer._buffers.keys() - {"order"} or set(layer._parameters) != {"encoder", "decoder", "bias"}:
        return "it has parameters, buffers or modules beside encoder, decoder and bias; remove them first"
    if isinstance(layer, LOW_RANK[nn.Linear]) and layer.slices > 1 and id(layer.encoder) in tied:
        return f"it shares its encoder, of {layer.slices} slices, with {tied[id(layer.encoder)]}; give it a copy"
    return None


def _refuse_saving(*args: Any, **kwargs: Any) -> NoReturn:
    raise ModelError(
        "the plain form cannot be loaded again by from_pretrained, so it is not saved; save the compressed model and "
        "call to_plain after loading it (adapters of peft: save the PeftModel)"
    )


def _forget_formats(model: nn.Module) -> None:
    """Take off what would let the copy be saved as a compressed model, which loading could not read."""
    vars(model).pop("alds_plan", None)
    for module in model.modules():
        config = getattr(module, "config", None)
        if vars(module).pop("hf_quantizer", None) is not None:
            vars(config).pop("quantization_config", None)
        if callable(getattr(type(module), "save_pretrained", None)):
            vars(module)["save_pretrained"] = _refuse_saving
