"""Compressed models of the transformers package: how they are described, loaded and saved.

A compressed checkpoint says in its config.json, as ``quantization_config`` with the method ``alds_fast``, which layers
are factorised and how. transformers hands that to the class registered here, which puts the low-rank layers in before
the weights are read; everything else (shards, device maps, types, tied weights, saving) is transformers' own.
No code that comes with a checkpoint is ever run.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import DependencyError, FileFormatError, ModelError, PlanError
from ..layers import LowRankLayer, MergedLinears, find_layers, label, low_rank_like
from ..linalg import Decomposition, WeightShape
from .transformers_keys import stored_names

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
        """``layers``: by module name, or by that of the stored weight, scheme, groups, rank and the weight's shape."""

        def __init__(self, layers: Any = None, version: Any = VERSION, **kwargs: Any) -> None:
            self.quant_method = METHOD
            self.version, self.layers = version, checked_layers(layers, version)

        def __reduce__(self) -> tuple[Any, ...]:
            return _new_config, (self.layers,)

    class AldsFastLoader(HfQuantizer):
        """Puts the low-rank layers in the place of the dense ones before the weights are read."""

        requires_calibration = True  # nothing is compressed while it is loaded

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            put_low_rank_layers(model, self.quantization_config.layers)

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            # These are plain floating-point layers: what transformers forbids quantized models (half, float,
            # training) they can do.
            for module in model.modules():
                if isinstance(module, transformers.PreTrainedModel):
                    module.config._is_quantized = False
            model.is_quantized = False
            keep_when_saved(model)
            return model

        def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
            return dtype

        def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
            """What is saved, before it is: the low-rank layers that are there now."""
            if any(isinstance(module, MergedLinears) for module in model.modules()):
                raise ModelError("layers merged by deploy cannot be saved; save the model that was given to deploy")
            model.config.quantization_config = AldsFastConfig(choices_in(model))
            return None, {}

        def _dequantize(self, model: Any, dtype: Any = None) -> Any:
            for name in choices_in(model):
                set_module(model, name, model.get_submodule(name).to_dense())
            dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # as saving leaves it in the config
            return model if dtype is None else model.to(dtype)

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

        @property
        def is_compileable(self) -> bool:
            return True

        def __reduce__(self) -> tuple[Any, ...]:
            return _new_loader, (self.quantization_config,)

    register_quantization_config(METHOD)(AldsFastConfig)
    register_quantizer(METHOD)(AldsFastLoader)
    return _Format(transformers, AldsFastConfig, AldsFastLoader)


def _new_config(layers: Any) -> Any:
    return transformers_format().config(layers)


def _new_loader(config: Any) -> Any:
    return transformers_format().loader(config, pre_quantized=True)


def checked_layers(layers: Any, version: Any) -> dict[str, dict[str, Any]]:
    """The layers of a config; FileFormatError unless it is one of this library's, of this version or an older one."""
    if not isinstance(version, int) or version > VERSION:
        raise FileFormatError(f"the checkpoint has format version {version!r}, newer than {VERSION}; update alds_fast")
    whole = isinstance(layers, Mapping)
    for name, fields in layers.items() if whole else ():
        try:
            Decomposition.from_dict(fields)
            list(fields["shape"])
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise FileFormatError(
                f"config.json: quantization_config: the layer {name!r} is damaged ({e}): {fields!r}"
            ) from e
    if not whole:
        raise FileFormatError(f"config.json: quantization_config has layers={layers!r}; compress the model again")
    return {name: {**fields, "shape": list(fields["shape"])} for name, fields in layers.items()}


def choices_in(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The low-rank layers of a model by name, as its config holds them."""
    low = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}
    return {name: layer_config(module.decomposition, module.weight_shape) for name, module in low.items()}


def layer_config(decomposition: Decomposition, shape: WeightShape) -> dict[str, Any]:
    """A low-rank layer as a config holds it."""
    return {**decomposition.to_dict(), "shape": list(shape.weight)}


def set_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of another one."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


def put_low_rank_layers(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Put empty low-rank layers, on the meta device, in a transformers model that is about to be loaded.

    The model may be a part of the one that was compressed, or have another head; layers that it does not have, or has
    in another size, are left out. Raises PlanError if a layer cannot be replaced, or if all are left out though some
    look like the model's.
    """
    prefix = getattr(model, "base_model_prefix", "")
    dense_layers = {layer.name: layer for layer in find_layers(model)}
    by_target, _ = stored_names(model, [f"{name}.weight" for name in layers])
    renamed = {stored.removesuffix(".weight"): target.removesuffix(".weight") for target, stored in by_target.items()}
    unknown, new = [], {}
    for stored, choice in layers.items():
        names = [renamed.get(stored, stored), stored, stored.removeprefix(f"{prefix}."), f"{prefix}.{stored}"]
        name = next((n for n in names if n in dense_layers), None)
        if name is None:
            unknown.append(stored)
        elif list(dense_layers[name].weight) == list(choice["shape"]):
            new[name] = stored
    for name, stored in new.items():
        layer, weight = dense_layers[name], dense_layers[name].module.weight
        if layer.reason is not None:
            raise PlanError(f"the checkpoint's layer {label(stored)} cannot be replaced: {layer.reason}")
        assert isinstance(weight, Tensor)
        low = low_rank_like(layer.module, Decomposition.from_dict(layers[stored]))
        set_module(model, name, low.to(weight.dtype).requires_grad_(weight.requires_grad))
    ends = {tuple(name.split(".")[-3:]): name for name in dense_layers}
    alike = next((stored for stored in unknown if tuple(stored.split(".")[-3:]) in ends), None)
    if alike is not None and not new:
        raise PlanError(
            f"the checkpoint's layer {label(alike)} is not in {type(model).__name__}, whose layer "
            f"{label(ends[tuple(alike.split('.')[-3:])])} may be meant; load the class that was compressed"
        )


def keep_when_saved(model: nn.Module) -> None:
    """Make ``save_pretrained`` of the transformers models in a compressed model say which layers are low-rank ones.

    Without that, loading them again would give dense layers with new random weights. Nothing happens where
    transformers has not been imported.
    """
    if "transformers" not in sys.modules or not any(isinstance(m, LowRankLayer) for m in model.modules()):
        return
    kind = transformers_format()
    for module in model.modules():
        if isinstance(module, kind.package.PreTrainedModel) and (settings := choices_in(module)):
            module.hf_quantizer = kind.loader(
                kind.config(settings), pre_quantized=True
            )  # describes it when it is saved
    for module in _outermost(model, kind.package.PreTrainedModel):
        if settings := choices_in(module):
            module.config.quantization_config = kind.config(settings)


def _outermost(model: nn.Module, kind: type) -> Iterator[Any]:
    if isinstance(model, kind):
        yield model
    else:
        for child in model.children():
            yield from _outermost(child, kind)


if "transformers" in sys.modules:
    transformers_format()  # so that its own from_pretrained knows compressed checkpoints
