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

from torch import nn

from ..errors import ModelError
from ..import_hooks import when_imported
from ..layers import LowRankLayer, LowRankLinear, MergedPart, label
from .peft_merging import base_of, check_merging, lora_class

_UTILS = "peft.tuners.tuners_utils"
_CHANGED = ("BaseTuner", "BaseTunerLayer", "SEQ_CLS_HEAD_NAMES", "check_adapters_to_merge")
_ALL_LINEAR = "_maybe_include_all_linear_layers"
_INITS = (True, False, "gaussian", "orthogonal", "eva")  # those that do not read the dense weight
_PLAIN = "adapt alds_fast.to_plain(model) instead"


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
    layers = {name: base_of(m) for name, m in model.named_modules()}
    layers = {name: base for name, base in layers.items() if isinstance(base, LowRankLayer | MergedPart)}
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
            config._register_custom_module({LowRankLinear: lora_class()})
        return original(self, model, adapter_name, *args, **kwargs)

    return inject_adapter


def _checking_merge(original: Any) -> Any:
    """``merge_and_unload`` or ``merge_adapter`` of ``BaseTuner``, which go through the layers one by one."""

    @functools.wraps(original)
    def merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_merging(self.model)
        return original(self, *args, **kwargs)

    return merge


def teach_peft() -> None:
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
    for name in ("merge_and_unload", "merge_adapter"):
        setattr(utils.BaseTuner, name, _checking_merge(getattr(utils.BaseTuner, name)))


def _modules_of_peft() -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.startswith("peft.")]


when_imported(_UTILS, teach_peft)
