"""Merging adapters of peft into low-rank layers.

A low-rank layer gets below an adapter in two ways: it was adapted, or the dense layer below the adapter was compressed.
In the second case the adapter is one of peft's own layers, which computes with the dense weight when it is merged.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..import_hooks import when_imported
from ..layers import Int8LowRankLinear, LowRankLayer, LowRankLinear, MergedPart, label
from ..linalg import Pivots, max_rank

_UTILS = "peft.tuners.tuners_utils"
_LORA = "peft.tuners.lora.layer"
_MERGING = {  # peft's layers that add to the weight of a base layer that compress may have replaced
    _LORA: ("Linear", "_ConvNd"),
    "peft.tuners.ia3.layer": ("Linear", "_ConvNd"),
    "peft.tuners.lycoris_utils": ("LycorisLayer",),
    "peft.tuners.adalora.layer": ("SVDLinear", "SVDConv2d"),
}


@torch.no_grad()
def grown_factors(layer: LowRankLinear, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Encoder and decoder of ``layer`` plus ``up @ down``, (rank, in_features) and (out_features, rank); no pivots.

    Every slice gets that much more rank, which is exact. Where this exceeds the full rank, it is the best
    decomposition of full rank.
    """
    scheme, slices, rank, _ = layer.decomposition
    full = max_rank(layer.weight_shape, scheme, slices)
    if rank + down.shape[0] > full:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(layer.dense_weight() + (up @ down).to(layer.encoder))
        low = LowRankLinear.from_dense(dense, rank=full, groups=slices, scheme=scheme)
        return low.encoder.detach(), low.decoder.detach()
    encoder, decoder = layer.plain_factors()
    parts = down.to(encoder).unflatten(1, (slices, -1)).transpose(0, 1)
    encoder = torch.cat([encoder.unflatten(0, (slices, rank)), parts], 1)
    ups = up.to(decoder)[:, None].expand(-1, slices, -1)
    decoder = torch.cat([decoder.unflatten(1, (slices, rank)), ups], 2)
    return encoder.flatten(0, 1), decoder.flatten(1)


class _OnLowRank:
    """What peft's LoRA layer does in another way where its base layer is a low-rank one."""

    _unmerged: tuple[Any, ...] | None = None  # the factors and the bias before the first merge

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, **options)  # type: ignore[call-arg]
        self.fan_in_fan_out = False  # also in the place of transformers' Conv1D

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapters into the factors: the rank grows by theirs, the sum is exact.

        ValueError with ``safe_merge`` if a factor would not be finite, ModelError if deploy has merged the base layer;
        nothing is changed then.
        """
        _check_layer(self)
        names = sys.modules[_UTILS].check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.lora_A]
        if not names:
            return
        layer = self.get_base_layer()
        down = torch.cat([self.lora_A[name].weight.detach() for name in names])
        up = torch.cat([self.lora_B[name].weight.detach() * self.scaling[name] for name in names], 1)
        factors, bias = grown_factors(layer, down, up), self._merged_bias(names)
        if safe_merge and not all(bool(torch.isfinite(f).all()) for f in (*factors, bias) if f is not None):
            raise ValueError(f"the adapters {names} or their base layer have NaN or infinite values")
        if self._unmerged is None:
            order = layer.order if layer.pivots else None
            self._unmerged = layer.encoder, layer.decoder, layer.bias, layer.pivots, order
        _set(layer, *factors, bias)
        self.merged_adapters.extend(names)

    def _merged_bias(self: Any, names: list[str]) -> Tensor | None:
        bias = self.get_base_layer().bias
        for name in names:
            if self.lora_bias[name]:
                more = self.lora_B[name].bias.detach() * self.scaling[name]
                bias = more if bias is None else bias.detach() + more.to(bias)
        return bias

    def unmerge(self: Any) -> None:
        """Put the factors back that were there before the first adapter was merged."""
        if self._unmerged is None:
            warnings.warn("no adapter is merged", stacklevel=2)
            return
        _set(self.get_base_layer(), *self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()


def _set(
    layer: LowRankLinear, encoder: Tensor, decoder: Tensor, bias: Tensor | None, pivots: Pivots = "",
    order: Tensor | None = None,
) -> None:  # fmt: skip
    """Put factors and bias in, in the type, on the device and with the requires_grad of those that are there."""
    layer._buffers.pop("order", None)
    layer.pivots = pivots
    if order is not None:
        layer.register_buffer("order", order)
    for name, new in (("encoder", encoder), ("decoder", decoder), ("bias", bias)):
        old = getattr(layer, name)
        like = layer.decoder if old is None else old
        if new is not old:
            setattr(layer, name, None if new is None else nn.Parameter(new.detach().to(like), like.requires_grad))
    layer.rank = encoder.shape[0] // layer.slices


@functools.cache
def lora_class() -> type:
    """peft's LoRA layer whose base layer is a low-rank linear one."""
    from peft.tuners.lora.layer import Linear

    return type("LoraLowRankLinear", (_OnLowRank, Linear), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """``LoraLowRankLinear``, the class of adapted layers, by which they are pickled: made when it is asked for."""
    if name == "LoraLowRankLinear":
        return lora_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def base_of(layer: Any) -> nn.Module:
    """The layer below an adapter of peft, and below the adapters in between; any other module itself."""
    utils = sys.modules.get(_UTILS)
    is_adapter = utils is not None and isinstance(layer, utils.BaseTunerLayer)
    base: nn.Module = layer.get_base_layer() if is_adapter else layer
    return base


def _why_not_merged(layer: Any) -> str | None:
    """Why peft cannot merge the adapters of this layer, and what to do; None if it can."""
    base = base_of(layer)
    if base is layer or hasattr(layer, "parameter_name"):  # peft's ParamWrapper adapts a factor as it is
        return None
    if isinstance(base, MergedPart):
        return "its base layer was merged by deploy; merge the adapters of the model that was given to deploy"
    if isinstance(base, Int8LowRankLinear):
        return "its base layer has int8 factors; take the adapters off by unload()"
    if not isinstance(base, LowRankLayer) or isinstance(layer, _OnLowRank) or _can_become_low_rank(layer, base):
        return None
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    return (
        f"{kind} would change the dense weight, which its {type(base).__name__} does not have; merge first, then "
        f"compress, or take the adapters off by unload()"
    )


def _can_become_low_rank(layer: Any, base: nn.Module) -> bool:
    plain_lora = type(layer) is sys.modules[_LORA].Linear and not layer.lora_variant
    return plain_lora and isinstance(base, LowRankLinear)


def _check_layer(layer: nn.Module) -> None:
    if (reason := _why_not_merged(layer)) is not None:
        raise ModelError(f"an adapter cannot be merged: {reason}")


def check_merging(model: nn.Module) -> None:
    """ModelError that names the first layer whose adapters cannot be merged."""
    for name, module in model.named_modules():
        if (reason := _why_not_merged(module)) is not None:
            raise ModelError(f"layer {label(name)} cannot be merged: {reason}")


def warn_of_lost_merging(model: nn.Module, names: Iterable[str]) -> None:
    """Say which adapters of layers below ``names`` cannot be merged any more, now that these are low-rank."""
    chosen = {id(model.get_submodule(name)) for name in names}
    reasons = {n: why for n, m in model.named_modules() if id(base_of(m)) in chosen and (why := _why_not_merged(m))}
    if reasons:
        name, why = next(iter(reasons.items()))
        warnings.warn(
            f"the adapters of {len(reasons)} layers work, but can no longer be merged: {label(name)}: {why}",
            stacklevel=3,
        )


def _merging_low_rank(original: Any) -> Any:
    """``merge`` of one of peft's layers, which becomes a :func:`lora_class` where its base layer is low-rank."""

    @functools.wraps(original)
    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        _check_layer(self)
        if not isinstance(base_of(self), LowRankLayer):
            return original(self, *args, **kwargs)
        self.__class__, self.fan_in_fan_out = lora_class(), False
        return self.merge(*args, **kwargs)

    return merge


def _teach_merging(module: str) -> None:
    for name in _MERGING[module]:
        layer = getattr(sys.modules[module], name, None)
        if layer is not None:
            layer.merge = _merging_low_rank(layer.merge)


for _module in _MERGING:
    when_imported(_module, functools.partial(_teach_merging, _module))
