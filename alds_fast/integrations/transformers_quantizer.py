"""Compressed models of the transformers package: how they are described, loaded and saved.

A compressed checkpoint says in its config.json, as ``quantization_config`` with the method ``alds_fast``, which layers
are factorised and how. transformers hands that to the class in transformers_loader, which puts the low-rank layers in
before the weights are read; everything else (shards, device maps, types, tied weights, saving) is transformers' own.
No code that comes with a checkpoint is ever run.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

from torch import nn

from ..errors import DependencyError
from ..import_hooks import when_imported
from ..layers import LowRankLayer, OpenedExperts, is_narrowed

_INSTALL = "pip install 'alds_fast[transformers]'"


def loader_module() -> Any:
    """This library's classes for transformers, registered there; DependencyError if it is absent, older or broken."""
    try:
        return importlib.import_module(".transformers_loader", __package__)
    except (ImportError, RuntimeError) as e:  # transformers makes RuntimeErrors of what fails inside of it
        raise _dependency_error(e) from e


def transformers_name(name: str) -> Any:
    """What transformers has under that name, None for nothing; DependencyError if it is absent, older or broken."""
    loader_module()
    try:
        return getattr(importlib.import_module("transformers"), name, None)
    except (ImportError, RuntimeError) as e:
        raise _dependency_error(e) from e


def _dependency_error(error: Exception) -> DependencyError:
    cause: BaseException = error
    while (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    first_line = next(iter(str(cause).splitlines()), "")
    remedy = _INSTALL
    if cause is not error:
        remedy += ", or mend the package at fault: this is the first of its import's errors"
    return DependencyError(
        f"this needs transformers 5.24 or newer, whose import fails ({type(cause).__name__}: {first_line}): {remedy}"
    )


def keep_when_saved(model: nn.Module) -> None:
    """Make ``save_pretrained`` of the transformers models in a model say which layers are low-rank, and opened experts.

    Without that, loading them again would give dense layers with new random weights. Nothing happens where
    transformers has not been imported.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not any(map(_is_changed, model.modules())):
        return
    if any(isinstance(module, modeling.PreTrainedModel) for module in model.modules()):
        loader_module().describe(model)


def _is_changed(module: nn.Module) -> bool:
    return isinstance(module, LowRankLayer | OpenedExperts) or is_narrowed(module)


def _register() -> None:
    """Make transformers' own from_pretrained know compressed checkpoints.

    One that is too old for that is not disturbed: it refuses these by the shapes of their tensors.
    """
    with contextlib.suppress(DependencyError):
        loader_module()


when_imported("transformers.quantizers.auto", _register)
