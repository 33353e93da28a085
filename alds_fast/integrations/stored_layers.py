"""Low-rank layers as files hold them: in config.json of a compressed directory, in the metadata of a saved model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import FileFormatError
from ..layers import Int8LowRankLinear, LowRankLayer, LowRankLinear, OpenedExperts, low_rank_like
from ..linalg import Decomposition, WeightShape

METHOD, INT8 = "alds_fast", "int8"
VERSION = 3  # 2 without int8 factors, 1 where no layer lost hidden units either: older versions of the library read it


def layer_fields(decomposition: Decomposition, shape: WeightShape) -> dict[str, Any]:
    """A low-rank layer as files hold it, of JSON's types: the dense weight's shape, scheme, groups and rank."""
    return {"shape": list(shape.weight), "conv_groups": shape.conv_groups, **decomposition.to_dict()}


def fields_of_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The low-rank layers of a model by name, as files hold them."""
    low = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}
    return {
        name: layer_fields(module.decomposition, module.weight_shape)
        | ({"factors": INT8} if isinstance(module, Int8LowRankLinear) else {})
        for name, module in low.items()
    }


def layer_of_fields(dense: nn.Module, fields: Mapping[str, Any]) -> LowRankLayer:
    """The empty low-rank layer, on the meta device, that a file has in the place of a dense one.

    FileFormatError for factors of a kind that is not known.
    """
    layer = low_rank_like(dense, Decomposition.from_dict(fields))
    if "factors" not in fields:
        return layer
    if fields["factors"] != INT8 or not isinstance(layer, LowRankLinear):
        raise FileFormatError(
            f"factors={fields['factors']!r} of a {type(layer).__name__} are not known; update alds_fast"
        )
    return Int8LowRankLinear.of(layer)


def format_version(layers: Mapping[str, Mapping[str, Any]], narrowed: Mapping[str, Any] | None) -> int:
    """The oldest version of the format that has what these layers need."""
    return VERSION if any("factors" in fields for fields in layers.values()) else 2 if narrowed else 1


def has_opened_experts(model: nn.Module) -> bool:
    """Whether mixtures of experts in the model are opened, which a file says once for all of them."""
    return any(isinstance(module, OpenedExperts) for module in model.modules())


def quantization_config(
    layers: Mapping[str, Mapping[str, Any]], opened_experts: bool = False, narrowed: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What config.json says of a compressed model, of JSON's types."""
    more: dict[str, Any] = {"opened_experts": True} if opened_experts else {}
    more |= {"narrowed": dict(narrowed)} if narrowed else {}
    return {"quant_method": METHOD, "version": format_version(layers, narrowed), "layers": dict(layers), **more}


def check_narrowed(narrowed: Any) -> None:
    """ValueError unless these are layers that lost outputs or inputs, as files hold them."""
    if not isinstance(narrowed, Mapping):
        raise ValueError("narrowed is not an object")
    for name, sizes in narrowed.items():
        for part in ("shape", "dense_shape"):
            pair = sizes.get(part) if isinstance(sizes, Mapping) else None
            if not isinstance(pair, list) or len(pair) != 2 or not all(type(n) is int and n > 0 for n in pair):
                raise ValueError(f"layer {name!r}: {part}={pair!r} are not two numbers of outputs and inputs")


def read_narrowed(narrowed: Any) -> dict[str, dict[str, list[int]]]:
    """The layers of a config that lost outputs or inputs; FileFormatError for what is none."""
    try:
        check_narrowed(narrowed or {})
    except ValueError as e:
        raise FileFormatError(f"config.json: quantization_config is damaged ({e}); compress the model again") from e
    return dict(narrowed or {})


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
