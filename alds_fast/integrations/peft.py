"""LoRA of the peft package on low-rank linear layers.

peft asks whether a layer is an ``nn.Linear``. Where it is imported, it learns that LoRA takes a ``LowRankLinear`` too,
that "all-linear" means these as well, and to refuse by name what needs a dense weight.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..import_hooks import when_imported
from ..layers import LowRankLayer, LowRankLinear, MergedPart, label
from ..linalg import max_rank

_UTILS = "peft.tuners.tuners_utils"
_CHANGED = ("BaseTuner", "BaseTunerLayer", "SEQ_CLS_HEAD_NAMES", "check_adapters_to_merge")
_ALL_LINEAR = "_maybe_include_all_linear_layers"
_INITS = (True, False, "gaussian", "orthogonal", "eva")  # those that do not read the dense weight
_PLAIN = "adapt alds_fast.to_plain(model) instead"


@torch.no_grad()
def grown_factors(layer: LowRankLinear, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Encoder and decoder of ``layer`` plus ``up @ down``, (rank, in_features) and (out_features, rank).

    Every slice gets that much more rank, which is exact. Where this exceeds the full rank, it is the best
    decomposition of full rank.
    """
    scheme, slices, rank = layer.decomposition
    full = max_rank(layer.weight_shape, scheme, slices)
    if rank + down.shape[0] > full:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(layer.dense_weight() + (up @ down).to(layer.encoder))
        low = LowRankLinear.from_dense(dense, rank=full, groups=slices, scheme=scheme)
        return low.encoder.detach(), low.decoder.detach()
    parts = down.to(layer.encoder).unflatten(1, (slices, -1)).transpose(0, 1)
    encoder = torch.cat([layer.encoder.unflatten(0, (slices, rank)), parts], 1)
    ups = up.to(layer.decoder)[:, None].expand(-1, slices, -1)
    decoder = torch.cat([layer.decoder.unflatten(1, (slices, rank)), ups], 2)
    return encoder.flatten(0, 1), decoder.flatten(1)


class _OnLowRank:
    """What peft's LoRA layer does in another way where its base layer is a low-rank one."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, **options)  # type: ignore[call-arg]
        self.fan_in_fan_out = False  # also in the place of transformers' Conv1D
        self._unmerged: tuple[Any, ...] | None = None

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapters into the factors: the rank grows by theirs, the sum is exact.

        ValueError with ``safe_merge`` if a factor would not be finite; nothing is changed then.
        """
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
            self._unmerged = layer.encoder, layer.decoder, layer.bias
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


def _set(layer: LowRankLinear, encoder: Tensor, decoder: Tensor, bias: Tensor | None) -> None:
    """Put factors and bias in, in the type, on the device and with the requires_grad of those that are there."""
    for name, new in (("encoder", encoder), ("decoder", decoder), ("bias", bias)):
        old = getattr(layer, name)
        like = layer.decoder if old is None else old
        if new is not old:
            setattr(layer, name, None if new is None else nn.Parameter(new.detach().to(like), like.requires_grad))
    layer.rank = encoder.shape[0] // layer.slices


@functools.cache
def _lora_class() -> type:
    from peft.tuners.lora.layer import Linear

    return type("LoraLowRankLinear", (_OnLowRank, Linear), {"__module__": __name__})


def adopt_adapters(model: nn.Module) -> None:
    """Make the adapters of a compressed model, whose base layers have become low-rank ones, merge into their factors.

    Those of LoRA, that is; other kinds of adapters have no merging that is exact.
    """
    lora: Any = sys.modules.get("peft.tuners.lora.layer")
    wrappers: list[Any] = [] if lora is None else [m for m in model.modules() if type(m) is lora.Linear]
    for wrapper in wrappers:
        if isinstance(wrapper.get_base_layer(), LowRankLinear):
            wrapper.__class__ = _lora_class()
            wrapper.fan_in_fan_out, wrapper._unmerged = False, None


def __getattr__(name: str) -> Any:
    """``LoraLowRankLinear``, the class of adapted layers, by which they are pickled: made when it is asked for."""
    if name == "LoraLowRankLinear":
        return _lora_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _why_not(config: Any, layer: nn.Module) -> str | None:
    """Why this layer cannot be adapted so, and what to do; None if it can."""
    method = getattr(config.peft_type, "value", config.peft_type)
    if isinstance(layer, MergedPart):
        return "it was merged by deploy; adapt the model that was given to deploy"
    if method != "LORA":
        return f"{method} does not know low-rank layers; {_PLAIN}"
    if not isinstance(layer, LowRankLinear):
        return f"LoRA does not know {type(layer).__name__}; {_PLAIN}"
    variants = [f.name for f in dataclasses.fields(config) if f.metadata.get("is_lora_variant")]
    used = [name for name in variants if getattr(config, name)]
    if config.init_lora_weights not in _INITS:
        used.append(f"init_lora_weights={config.init_lora_weights!r}")
    return f"{', '.join(used)} needs a dense weight; leave it out, or {_PLAIN}" if used else None


def _all_linear_names(utils: Any, config: Any, model: Any) -> set[str]:
    """The low-rank linear layers that "all-linear" means: not heads, nor what lies in a layer of peft's own."""
    adapted = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, utils.BaseTunerLayer))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None and config.task_type == "SEQ_CLS":
        heads = [getattr(model, name, None) for name in utils.SEQ_CLS_HEAD_NAMES]
        head = next((m for m in heads if m is not None), None)
    return {
        name
        for name, m in model.named_modules()
        if isinstance(m, LowRankLinear | MergedPart) and m is not head and not name.startswith(adapted)
    }


def _including_low_rank(utils: Any, original: Any) -> Any:
    @functools.wraps(original)
    def include_all_linear_layers(config: Any, model: nn.Module) -> Any:
        targets = getattr(config, "target_modules", None)
        names: set[str] = set()
        if isinstance(targets, str) and targets.lower() == "all-linear":
            names = _all_linear_names(utils, config, model)
        config = original(config, model)
        if names:
            config.target_modules = {*config.target_modules, *names}
        return config

    return include_all_linear_layers


def _check_targets(utils: Any, tuner: Any, model: nn.Module, config: Any) -> None:
    """ModelError, before anything is changed, if a low-rank layer is a target that cannot be adapted."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LowRankLayer | MergedPart)}
    if not layers or not hasattr(config, "target_modules"):
        return
    config = tuner._prepare_adapter_config(copy.copy(config), tuner.get_model_config(model))
    config = getattr(utils, _ALL_LINEAR)(config, model)
    targets = [n for n in layers if config.target_modules and tuner._check_target_module_exists(config, n)]
    for name in targets:
        if (reason := _why_not(config, layers[name])) is not None:
            raise ModelError(f"layer {label(name)} cannot be adapted: {reason}")


def _checking_first(utils: Any, original: Any) -> Any:
    """``BaseTuner.__init__``; some methods look for layers they know before they come to ``inject_adapter``."""

    @functools.wraps(original)
    def init(self: Any, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
        _check_targets(utils, self, model, config)
        original(self, model, peft_config, adapter_name, *args, **kwargs)

    return init


def _knowing_low_rank(utils: Any, original: Any) -> Any:
    """``BaseTuner.inject_adapter``, which later adapters go through too."""

    @functools.wraps(original)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config[adapter_name]
        _check_targets(utils, self, model, config)
        if config.peft_type == "LORA" and any(isinstance(m, LowRankLinear) for m in model.modules()):
            config._register_custom_module({LowRankLinear: _lora_class()})
        return original(self, model, adapter_name, *args, **kwargs)

    return inject_adapter


def _teach_peft() -> None:
    """Change what this peft asks of layers, in every module of it that has been imported."""
    utils: Any = sys.modules[_UTILS]
    missing = [name for name in (*_CHANGED, _ALL_LINEAR) if not hasattr(utils, name)]
    if missing:
        warnings.warn(f"this peft has no {missing}: it cannot adapt low-rank layers; {_PLAIN}", stacklevel=2)
        return
    original = getattr(utils, _ALL_LINEAR)
    changed = _including_low_rank(utils, original)
    for module in _modules_of_peft():
        if vars(module).get(_ALL_LINEAR) is original:
            setattr(module, _ALL_LINEAR, changed)
    utils.BaseTuner.__init__ = _checking_first(utils, utils.BaseTuner.__init__)
    utils.BaseTuner.inject_adapter = _knowing_low_rank(utils, utils.BaseTuner.inject_adapter)


def _modules_of_peft() -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.startswith("peft.")]


when_imported(_UTILS, _teach_peft)
