"""The structure of a transformers model without its weights, and under which names these are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .errors import AldsError, ArgumentError, ModelError
from .huggingface import transformers_format
from .pretrained import class_of
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
    settings = shards.config.get("quantization_config")
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise ArgumentError(f"the checkpoint {str(shards.folder)!r} is quantized or compressed already ({method})")
    cls, config = class_of(shards.config), _config_of(shards)
    try:
        with torch.device("meta"):
            model: nn.Module = cls(config)
    except Exception as e:
        raise ModelError(f"{cls.__name__} cannot be built from its config: {type(e).__name__}: {e}") from e
    return model
