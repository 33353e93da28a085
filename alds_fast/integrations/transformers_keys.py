"""Under which names transformers stores the tensors of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import DependencyError


def stored_names(model: nn.Module, names: Sequence[str]) -> tuple[dict[str, str], set[str]]:
    """Under which name each tensor of a transformers model is stored, and which are put together from several.

    ``names`` are those in the checkpoint; they may lack or have the prefix of the base model, or be older names that
    transformers renames while loading. Tensors that it puts together from several, or changes, are in the set alone.
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
    stored: dict[str, str] = {}
    assembled: set[str] = set()
    for name in names:
        target, converted = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, converted = name, None
        if converted is not None:
            assembled.add(target)
        elif target in expected:
            stored[target] = name
    return stored, assembled
