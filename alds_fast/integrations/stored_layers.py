"""Low-rank layers as files hold them: in config.json of a compressed directory, in the metadata of a saved model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import FileFormatError
from ..layers import LowRankLayer, OpenedExperts
from ..linalg import Decomposition, WeightShape

METHOD, VERSION = "alds_fast", 1


def layer_fields(decomposition: Decomposition, shape: WeightShape) -> dict[str, Any]:
    """A low-rank layer as files hold it, of JSON's types: the dense weight's shape, scheme, groups and rank."""
    return {"shape": list(shape.weight), "conv_groups": shape.conv_groups, **decomposition.to_dict()}


def fields_of_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The low-rank layers of a model by name, as files hold them."""
    low = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}
    return {name: layer_fields(module.decomposition, module.weight_shape) for name, module in low.items()}


def has_opened_experts(model: nn.Module) -> bool:
    """Whether mixtures of experts in the model are opened, which a file says once for all of them."""
    return any(isinstance(module, OpenedExperts) for module in model.modules())


def quantization_config(layers: Mapping[str, Mapping[str, Any]], opened_experts: bool = False) -> dict[str, Any]:
    """What config.json says of a compressed model, of JSON's types."""
    opened = {"opened_experts": True} if opened_experts else {}
    return {"quant_method": METHOD, "version": VERSION, "layers": dict(layers), **opened}


def read_layers(layers: Any, version: Any) -> dict[str, dict[str, Any]]:
    """The layers of a config; FileFormatError unless it is one of this library's, of this version or an older one."""
    if not isinstance(version, int) or version > VERSION:
        raise FileFormatError(f"the checkpoint has format version {version!r}, newer than {VERSION}; update alds_fast")
    if not isinstance(layers, Mapping):
        raise FileFormatError(f"config.json: quantization_config has layers={layers!r}; compress the model again")
    return {name: _read_fields(name, fields) for name, fields in layers.items()}


def _read_fields(name: str, fields: Any) -> dict[str, Any]:
    try:
        Decomposition.from_dict(fields)
        return {**fields, "shape": list(fields["shape"])}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise FileFormatError(
            f"config.json: quantization_config: the layer {name!r} is damaged ({e}): {fields!r}"
        ) from e
