"""Compressed models of the transformers package: how they are described, loaded and saved.

A compressed checkpoint says in its config.json, as ``quantization_config`` with the method ``alds_fast``, which layers
are factorised and how. transformers hands that to the class registered here, which puts the low-rank layers in before
the weights are read; everything else (shards, device maps, types, tied weights, saving) is transformers' own.
No code that comes with a checkpoint is ever run.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .discover import find_layers, label
from .errors import ArgumentError, DependencyError, FileFormatError, ModelError, PlanError
from .layers import LowRankLayer
from .merged import MergedLinears
from .replace import low_rank_like
from .shards import open_shards

METHOD, VERSION = "alds_fast", 1
_INSTALL = "pip install 'alds_fast[transformers]'"


class _Format(NamedTuple):
    package: Any  # transformers
    config: Any  # what its config.json holds of a compressed model
    loader: Any  # what loads one


@functools.cache
def transformers_format() -> _Format:
    """This library's format, registered with transformers; DependencyError if that is not installed."""
    try:
        import transformers
        from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
        from transformers.utils.quantization_config import QuantizationConfigMixin
    except ImportError as e:
        raise DependencyError(f"this needs transformers 5 or newer ({e}): {_INSTALL}") from e

    class AldsFastConfig(QuantizationConfigMixin):
        """``layers``: by module name [scheme, groups, rank]."""

        def __init__(self, layers: Mapping[str, list[int]], version: int = VERSION, **kwargs: Any) -> None:
            self.quant_method = METHOD
            self.version, self.layers = version, {name: list(choice) for name, choice in layers.items()}

    class AldsFastLoader(HfQuantizer):
        """Puts the low-rank layers in the place of the dense ones before the weights are read."""

        requires_calibration = True  # nothing is compressed while it is loaded

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            if self.quantization_config.version > VERSION:
                raise FileFormatError(
                    f"the checkpoint has format version {self.quantization_config.version}, newer than {VERSION}; "
                    f"update alds_fast"
                )
            put_in(model, self.quantization_config.layers)

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            # These are plain floating-point layers: what transformers forbids quantized models (half, float,
            # training) they can do.
            for module in model.modules():
                if isinstance(module, transformers.PreTrainedModel):
                    module.config._is_quantized = False
            model.is_quantized = False
            return model

        def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
            return dtype

        def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
            """What is saved, before it is: the low-rank layers that are there now."""
            if any(isinstance(module, MergedLinears) for module in model.modules()):
                raise ModelError("layers merged by deploy cannot be saved; save the model that was given to deploy")
            model.config.quantization_config = AldsFastConfig(choices_in(model))
            return None, {}

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

        @property
        def is_compileable(self) -> bool:
            return True

    register_quantization_config(METHOD)(AldsFastConfig)
    register_quantizer(METHOD)(AldsFastLoader)
    return _Format(transformers, AldsFastConfig, AldsFastLoader)


def choices_in(model: nn.Module) -> dict[str, list[int]]:
    """The low-rank layers of a model: by name [scheme, groups, rank]."""
    low = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}
    return {name: [module.scheme, module.groups, module.rank] for name, module in low.items()}


def put_in(model: nn.Module, layers: Mapping[str, list[int]]) -> None:
    """Put empty low-rank layers, on the meta device, in a model; by name [scheme, groups, rank].

    A base model that is loaded from the checkpoint of one with a head, or the other way round, has other names.
    """
    prefix = getattr(model, "base_model_prefix", "")
    found = {layer.name: layer for layer in find_layers(model)}
    for stored, choice in layers.items():
        names = [stored, stored.removeprefix(f"{prefix}."), f"{prefix}.{stored}"]
        name = next((n for n in names if n in found), None)
        if name is None:
            if not isinstance(model, transformers_format().package.PreTrainedModel) or model.base_model is model:
                continue  # a layer of a head that this base model does not have
            raise PlanError(f"the checkpoint's layer {label(stored)} is not a layer of {type(model).__name__}")
        layer = found[name]
        if layer.reason is not None:
            raise PlanError(f"the checkpoint's layer {label(stored)} cannot be replaced: {layer.reason}")
        weight: Any = layer.module.weight
        new = low_rank_like(layer.module, *choice).to(weight.dtype).requires_grad_(weight.requires_grad)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new)
    _leave_to_the_file(model)


def _leave_to_the_file(model: nn.Module) -> None:
    """Keep transformers from initialising dense weights, which are not there, of the modules around low-rank layers.

    (GPT-2's attention does that, say. A module with tensors of its own is left alone: they may need it.)
    """
    for module in model.modules():
        inside = any(isinstance(m, LowRankLayer) for m in module.modules())
        if inside and not module._parameters and not module._buffers:
            vars(module)["_is_hf_initialized"] = True


def class_of(config: Mapping[str, Any]) -> Any:
    """The class of transformers that the config names; ModelError if there is none."""
    names = config.get("architectures") or []
    package = transformers_format().package
    for name in names:
        found = getattr(package, str(name), None)
        if isinstance(found, type) and issubclass(found, package.PreTrainedModel):
            return found
    remote = ", and code that comes with a checkpoint is never run" if "auto_map" in config else ""
    raise ModelError(
        f"config.json names the architectures {names}, none of which transformers {package.__version__} has{remote}; "
        f"update transformers, or add the name of the model's class"
    )


def keep_when_saved(model: nn.Module) -> None:
    """Make ``save_pretrained`` of the transformers models in a compressed model say which layers are low-rank ones.

    Without that, loading them again would give dense layers with new random weights. Nothing happens where
    transformers has not been imported.
    """
    if "transformers" not in sys.modules or not any(isinstance(m, LowRankLayer) for m in model.modules()):
        return
    kind = transformers_format()
    for module in _outermost(model, kind.package.PreTrainedModel):
        if settings := choices_in(module):
            module.config.quantization_config = kind.config(settings)
            module.hf_quantizer = kind.loader(module.config.quantization_config, pre_quantized=True)


def _outermost(model: nn.Module, kind: type) -> Iterator[Any]:
    if isinstance(model, kind):
        yield model
    else:
        for child in model.children():
            yield from _outermost(child, kind)


def from_pretrained(folder: str | os.PathLike[str], cls: Any = None, **kwargs: Any) -> Any:
    """Load a compressed checkpoint directory as a model of transformers, with its low-rank layers.

    Args:
        folder: written by ``alds-fast compress``, :func:`alds_fast.compress_checkpoint` or ``save_pretrained`` of a
            model loaded by this function.
        cls: the class to load it as, for example ``transformers.AutoModel``; the one that config.json names if None.
        kwargs: those of transformers' ``from_pretrained``: dtype, device_map, attn_implementation, ...

    Returns:
        The model, in evaluation mode. It generates, trains, moves and saves as any other; ``save_pretrained`` keeps it
        compressed. Where the format has been registered once, by this function, transformers' own ``from_pretrained``
        loads it too.

    Raises:
        DependencyError: transformers is not installed.
        MissingFileError, FileFormatError: a file is missing, truncated, corrupt or of a newer version.
        ArgumentError: the checkpoint was not compressed by this library, or trust_remote_code is asked for.
        ModelError, PlanError: transformers does not know the model, or the file is of another one.
    """
    if kwargs.get("trust_remote_code"):
        raise ArgumentError("trust_remote_code=True: code that comes with a checkpoint is never run")
    shards = open_shards(folder)
    settings = shards.config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
        raise ArgumentError(
            f"{os.fspath(folder)!r} was not compressed by alds_fast: its config.json says nothing of it; load it with "
            f"transformers, or compress it first"
        )
    model_class = class_of(shards.config) if cls is None else cls
    transformers_format()
    wants_info = kwargs.pop("output_loading_info", False)
    model, info = model_class.from_pretrained(
        shards.folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, **kwargs
    )
    low = {name for name, module in model.named_modules() if isinstance(module, LowRankLayer)}
    lost = sorted(key for key in info["missing_keys"] if key.rpartition(".")[0] in low)
    if lost:
        raise FileFormatError(f"{os.fspath(folder)!r} lacks {lost[0]!r}, which its config.json asks for")
    return (model, info) if wants_info else model
