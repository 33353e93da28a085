"""Load compressed checkpoint directories as models of transformers."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from torch import nn

from ..errors import ArgumentError, FileFormatError, ModelError, PlanError
from ..integrations import (
    METHOD,
    keep_when_saved,
    quantization_config,
    read_layers,
    read_narrowed,
    transformers_name,
)
from ..layers import LowRankLayer, annotate
from ..planning import Plan
from .safetensors_reader import Shards, open_shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAN = "alds_plan.json"
Class = TypeVar("Class", bound=nn.Module)
Folder = str | os.PathLike[str]


def class_of(config: Mapping[str, Any]) -> Any:
    """The class of transformers that the config names; ModelError if there is none."""
    names, base = config.get("architectures") or [], transformers_name("PreTrainedModel")
    for name in names:
        cls = transformers_name(str(name))
        if isinstance(cls, type) and issubclass(cls, base):
            return cls
    remote = ", and code that comes with a checkpoint is never run" if "auto_map" in config else ""
    raise ModelError(
        f"config.json names the architectures {names}, none of which transformers {transformers_name('__version__')} "
        f"has{remote}; update transformers, or add the name of the model's class"
    )


@overload
def from_pretrained(
    folder: Folder, cls: Any = ..., *, output_loading_info: Literal[True], **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]: ...


@overload
def from_pretrained(folder: Folder, cls: type[Class], **kwargs: Any) -> Class: ...


@overload
def from_pretrained(folder: Folder, cls: Any = ..., **kwargs: Any) -> PreTrainedModel: ...


def from_pretrained(folder: Folder, cls: Any = None, **kwargs: Any) -> Any:
    """Load a compressed checkpoint directory as a model of transformers, with its low-rank layers.

    Args:
        folder: written by ``alds-fast compress``, :func:`alds_fast.compress_checkpoint` or ``save_pretrained`` of a
            model loaded by this function.
        cls: the class to load it as, for example ``transformers.AutoModel``; the one that config.json names if None.
        kwargs: those of transformers' ``from_pretrained``: dtype, device_map, attn_implementation, ...

    Returns:
        The model, in evaluation mode. It generates, trains, moves and saves as any other; ``save_pretrained`` keeps it
        compressed, ``dequantize`` makes it dense. transformers' own ``from_pretrained`` loads it too in a process that
        imports alds_fast, before transformers or after it. In any other it refuses the shapes of the weights.

    Raises:
        DependencyError: transformers is not installed, or its import fails.
        MissingFileError, FileFormatError: a file is missing, truncated, corrupt or of a newer version.
        ArgumentError: the checkpoint was not compressed by this library, or trust_remote_code is asked for.
        ModelError, PlanError: transformers does not know the model, or the file is of another one.
    """
    if kwargs.pop("trust_remote_code", False):
        raise ArgumentError("trust_remote_code=True: code that comes with a checkpoint is never run")
    kwargs.pop("local_files_only", None)
    shards = open_shards(folder)
    layers, plan = _layers_in(shards), plan_of_directory(shards.folder)  # what is damaged is said before the work
    model_class = class_of(shards.config) if cls is None else cls
    opened = bool(shards.config["quantization_config"].get("opened_experts"))
    narrowed = read_narrowed(shards.config["quantization_config"].get("narrowed"))
    described = quantization_config(layers, opened, narrowed)
    kwargs |= _config_for(model_class, shards, kwargs.pop("config", None), described)
    wants_info, new_where_sizes_differ = (
        kwargs.pop(k, False) for k in ("output_loading_info", "ignore_mismatched_sizes")
    )
    fixed = {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
    model, info = model_class.from_pretrained(shards.folder, ignore_mismatched_sizes=True, **fixed, **kwargs)
    _check_loaded(model, info, layers, os.fspath(folder))
    if not new_where_sizes_differ:
        _check_sizes(model, info, os.fspath(folder))
    if plan is not None and {row.name for row in plan.layers if row.choice} <= {n for n, _ in model.named_modules()}:
        annotate(model, plan=plan)
        keep_when_saved(model)
    return (model, info) if wants_info else model


def plan_of_directory(folder: Folder) -> Plan | None:
    """The plan of a compressed directory: of the file that holds it, or else of config.json; None without any.

    Raises MissingFileError or FileFormatError as :func:`from_pretrained` does.
    """
    path = Path(folder) / PLAN
    if not path.is_file():
        return _plan_in(open_shards(folder))
    try:
        return Plan.from_json(path.read_text())
    except (PlanError, ValueError) as e:
        raise FileFormatError(f"{str(path)!r} is damaged ({e}); compress the checkpoint again") from e


def _plan_in(shards: Shards) -> Plan | None:
    settings = shards.config.get("quantization_config")
    kept = settings.get("plan") if isinstance(settings, dict) else None
    try:
        return None if kept is None else Plan.from_json(json.dumps(kept))
    except (PlanError, ValueError) as e:
        raise FileFormatError(f"{str(shards.folder)!r}: the plan in config.json is damaged ({e})") from e


def compressed_layers(folder: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The low-rank layers of a compressed directory by name: shape of the dense weight, scheme, groups, rank.

    Raises MissingFileError or FileFormatError as :func:`from_pretrained` does, ArgumentError if the directory was not
    compressed by this library.
    """
    return _layers_in(open_shards(folder))


def _layers_in(shards: Shards) -> dict[str, dict[str, Any]]:
    settings = shards.config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
        raise ArgumentError(
            f"{str(shards.folder)!r} was not compressed by alds_fast: its config.json says nothing of it; load it with "
            f"transformers, or compress it first"
        )
    return read_layers(settings.get("layers"), settings.get("version"))


def _config_for(cls: Any, shards: Shards, config: Any, described: Mapping[str, Any]) -> dict[str, Any]:
    """The config to load with, where transformers' own choice would not know of the low-rank layers.

    (That of a part of the model, say; or one that the user passes.)
    """
    config_class = getattr(cls, "config_class", None)
    if config is None and config_class is not None:
        config = config_class.from_pretrained(shards.folder, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            return {}
    if config is None:
        return {}
    config = copy.deepcopy(config)
    config.quantization_config = dict(described)
    return {"config": config}


def _check_loaded(model: nn.Module, info: Mapping[str, Any], layers: Mapping[str, Any], folder: str) -> None:
    """FileFormatError where the files do not hold what config.json says."""
    low = {name for name, module in model.named_modules() if isinstance(module, LowRankLayer)}
    lost = sorted(key for key in info["missing_keys"] if key.rpartition(".")[0] in low)
    if lost:
        raise FileFormatError(f"{folder!r} lacks {lost[0]!r}, which its config.json asks for; compress it again")
    without_values = {*info["missing_keys"], *(key for key, _, _ in info["mismatched_keys"])}
    dense = {key.removesuffix(".weight") for key in without_values if key.endswith(".weight")}
    factors = {key.rpartition(".")[0] for key in info["unexpected_keys"] if key.endswith((".encoder", ".decoder"))}
    unknown = sorted(factors & dense - set(layers))
    if unknown:
        raise FileFormatError(
            f"{folder!r} has factors of {unknown[0]!r}, of which its config.json says nothing; compress it again"
        )


def _check_sizes(model: nn.Module, info: Mapping[str, Any], folder: str) -> None:
    """PlanError where the files hold a tensor, or the factors of one, of another size than the model's."""
    for name, stored, expected in sorted(info["mismatched_keys"])[:1]:
        size = "of another size" if set(stored) == {1} else f"of shape {tuple(stored)}"
        raise PlanError(
            f"{folder!r}: {name!r} is {size}, {type(model).__name__} has it of shape {tuple(expected)}; load the class "
            f"and the sizes that were compressed, or pass ignore_mismatched_sizes=True for new values there"
        )
