"""The structure of a transformers model without its weights, and under which names these are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...errors import AldsError, ArgumentError, FileFormatError, ModelError
from ...integrations import transformers_name
from ...layers import find_layers
from ..pretrained import class_of
from ..safetensors_reader import Shards


def config_of(shards: Shards) -> Any:
    """transformers' configuration of a checkpoint directory; ModelError where it knows none."""
    try:
        return transformers_name("AutoConfig").from_pretrained(
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
    settings = shards.config.get("quantization_config")
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        ours = "; its low-rank layers are cut further in memory: from_pretrained, compress, save_pretrained"
        raise ArgumentError(
            f"the checkpoint {str(shards.folder)!r} is quantized or compressed already ({method})"
            f"{ours if method == 'alds_fast' else '; pass the directory of the weights before that'}"
        )
    cls, config = class_of(shards.config), config_of(shards)
    try:
        with torch.device("meta"):
            model: nn.Module = cls(config)
    except Exception as e:
        raise ModelError(f"{cls.__name__} cannot be built from its config: {type(e).__name__}: {e}") from e
    return model


def check_stored(model: nn.Module, shards: Shards, names: Mapping[str, str], assembled: set[str]) -> None:
    """FileFormatError unless every Linear or convolution of the model has a weight, and all have the model's shapes.

    ``names`` and ``assembled`` are those of :func:`alds_fast.integrations.stored_names`.
    """
    expected = model.state_dict(keep_vars=True)
    for target, source in names.items():
        stored = shards.tensors[source]
        if stored.shape != tuple(expected[target].shape):
            raise FileFormatError(
                f"{stored.file.name}: {source!r} has shape {stored.shape}, {type(model).__name__} with this "
                f"config.json expects {tuple(expected[target].shape)}; the checkpoint is of another model"
            )
    present = {id(expected[target]) for target in {*names, *assembled} if target in expected}
    for layer in find_layers(model):
        weight = layer.module._parameters.get("weight")
        if layer.shape is not None and weight is not None and id(weight) not in present:
            raise FileFormatError(
                f"{str(shards.folder)!r} lacks {f'{layer.name}.weight'!r}, which {type(model).__name__} has"
            )


def untie(model: nn.Module, shards: Shards, names: Mapping[str, str]) -> None:
    """Take tensors that the model ties, but that are stored with different values, apart, as transformers does."""
    seen: dict[int, str] = {}
    for target, parameter in list(model.named_parameters(remove_duplicate=False)):
        if target not in names:
            continue
        first = seen.setdefault(id(parameter), target)
        if first != target and shards.tensors[names[first]].crc32() != shards.tensors[names[target]].crc32():
            parent, _, attribute = target.rpartition(".")
            setattr(model.get_submodule(parent), attribute, nn.Parameter(parameter.detach().clone(), False))
