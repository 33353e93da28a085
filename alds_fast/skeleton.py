"""The structure of a transformers model without its weights, and under which names these are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .errors import AldsError, ArgumentError, DependencyError, ModelError
from .huggingface import class_of, transformers_format
from .shards import Shards


def _config_of(shards: Shards) -> Any:
    try:
        return transformers_format().package.AutoConfig.from_pretrained(
            shards.folder, trust_remote_code=False, local_files_only=True
        )
    except AldsError:
        raise
    except Exception as e:
        raise ModelError(f"transformers cannot read {str(shards.folder)!r}/config.json: {e}") from e


def skeleton(shards: Shards) -> nn.Module:
    """The model of a checkpoint directory on the meta device: all its modules, ties included, and no values.

    Raises DependencyError without transformers, ModelError if that does not know the model, ArgumentError if the
    checkpoint is quantized or compressed already.
    """
    if "quantization_config" in shards.config:
        method = dict(shards.config["quantization_config"]).get("quant_method")
        raise ArgumentError(f"the checkpoint {str(shards.folder)!r} is quantized or compressed already ({method})")
    cls, config = class_of(shards.config), _config_of(shards)
    try:
        with torch.device("meta"):
            model: nn.Module = cls(config)
    except Exception as e:
        raise ModelError(f"{cls.__name__} cannot be built from its config: {type(e).__name__}: {e}") from e
    return model


def stored_names(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Under which name each tensor of a transformers model is stored, for those that are stored as they are.

    ``names`` are those in the checkpoint; they may lack or have the prefix of the base model, or be older names that
    transformers renames while loading. A tensor that it puts together from several, or changes, is left out.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError as e:
        raise DependencyError(f"this needs transformers 5.24, or one that maps names in the same way: {e}") from e
    any_model: Any = model
    mapping = get_model_conversion_mapping(any_model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    expected, prefix = model.state_dict(), any_model.base_model_prefix
    found: dict[str, str] = {}
    for name in names:
        target, converted = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, converted = name, None
        if target in expected and converted is None:
            found[target] = name
    return found
