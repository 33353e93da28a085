"""Save and load compressed models: one safetensors file, no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checks import check_model, explaining
from ..errors import ArgumentError, FileWriteError, LayerNotFoundError, ModelError, PlanError
from ..files import crc32, replacing, target_file
from ..integrations import fields_of_layers, format_version, keep_when_saved, layer_of_fields
from ..layers import (
    MergedLinears,
    annotate,
    find_layers,
    has_plain_memory,
    holds_experts,
    label,
    narrowed_sizes,
    opened_for,
    overlaps,
    replace_layers,
    with_sizes,
)
from ..planning import Analysis, Plan
from .file_format import FORMAT, memory_order, own_storages, read_header, read_tensors

_AS_COMPRESSED = "build the model as the one that was compressed, of the same class, sizes and options"
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")  # what torch.load is given


def unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state's tensors without repeats, and for every repeated name the name that is kept."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ModelError(f"state {name!r} is a {type(tensor).__name__}; only tensors can be saved in safetensors")
        if tensor.is_meta:
            raise ModelError(f"state {name!r} is on the meta device and has no values to save")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ModelError(f"state {name!r} is sparse or quantized; only dense tensors can be saved in safetensors")
        if not has_plain_memory(tensor):
            raise ModelError(
                f"state {name!r} is a {type(tensor).__name__} without memory of its own; only plain tensors can be "
                f"saved in safetensors: save the model before it is quantised, or gather its shards first"
            )
        storage = tensor.untyped_storage().data_ptr()
        key = (tensor.device, storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        first = seen.setdefault(key, name) if storage else name
        if first != name:
            aliases[name] = first
        else:
            kept[name] = tensor.detach()
    return kept, aliases


def _refuse_merged(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, MergedLinears):
            raise ModelError(
                f"{name!r}: merged layers cannot be saved; save the model that was given to deploy, and deploy's table"
            )
        if getattr(module, "merged_adapters", None):  # a file does not say so: loaded, they would count twice
            raise ModelError(
                f"layer {label(name)}: its adapters {module.merged_adapters} are merged into the weights and still "
                f"there; unmerge_adapter() first, or take merge_and_unload()"
            )


def structure(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What :func:`rebuild` needs of every low-rank layer, by name; of JSON's types."""
    return {
        n: {**fields, "kind": type(model.get_submodule(n)).__name__} for n, fields in fields_of_layers(model).items()
    }


def model_file(path: str | os.PathLike[str]) -> Path:
    """The file that :func:`save` writes; refused where none can be written, or by the ending of a pickled one."""
    target = target_file(path)
    if target.suffix.lower() in _PICKLED:
        raise ArgumentError(f"{target.name!r} would be a safetensors file: name it {target.stem}.safetensors")
    return target


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a compressed model as one safetensors file, atomically: a killed save leaves the old file whole.

    Parameters and buffers are stored in their own types, shared ones once, with the plan and the layers' structure in
    the metadata. Raises ModelError if the model is not a compressed one or holds state that is not a tensor,
    MissingFileError if the directory does not exist, ArgumentError for a name that ends as pickled files do (.pt, .pth,
    .bin, .ckpt), FileWriteError if the file cannot be written.
    """
    if isinstance(model, Analysis):
        raise ModelError("model is an Analysis, which save_analysis(analysis, path) writes")
    check_model(model)
    target = model_file(path)
    _refuse_merged(model)
    layers, narrowed, plan = structure(model), narrowed_sizes(model), getattr(model, "alds_plan", None)
    if not layers and not narrowed and not isinstance(plan, Plan):
        raise ModelError("the model has no low-rank layer and no plan: it was not made by compress() or Plan.apply()")
    tensors, aliases = unique_tensors(model)
    orders = {n: order for n, t in tensors.items() if (order := memory_order(t)) is not None}
    stored = own_storages({n: t.cpu().permute(orders[n]) if n in orders else t.cpu() for n, t in tensors.items()})
    metadata = {
        "format": FORMAT, "version": str(format_version(layers, narrowed)),
        "layers": json.dumps(layers), "aliases": json.dumps(aliases),
        "orders": json.dumps(orders), "crc32": json.dumps({n: crc32(t) for n, t in stored.items()}),
        "plan": plan.to_json() if isinstance(plan, Plan) else "",
        **({"narrowed": json.dumps(narrowed)} if narrowed else {}),
    }  # fmt: skip
    try:
        with replacing(target) as temporary:
            save_file(stored, temporary, metadata)
    except KeyError as e:
        raise ModelError(f"the model holds a tensor of type {e}, which safetensors cannot store") from e
    except SafetensorError as e:
        raise FileWriteError(f"{str(target)!r} could not be written ({e}); what stood there before is unchanged") from e


def rebuild(model: nn.Module, layers: dict[str, dict[str, Any]], narrowed: Mapping[str, Any]) -> nn.Module:
    """A copy of the dense model with empty low-rank layers, and narrower ones, where the file has them."""
    model = with_sizes(opened_for(model, {**layers, **narrowed}), narrowed)
    dense_layers = {layer.name: layer for layer in find_layers(model)}
    new = {}
    for name, spec in layers.items():
        layer = dense_layers.get(name)
        if layer is None or layer.shape is None:
            opened = any(map(holds_experts, model.modules()))
            remedy = "pass alds_fast.open_experts(model)" if opened else _AS_COMPRESSED
            raise LayerNotFoundError(
                f"the file's layer {label(name)} is not a Linear or convolution of the model; {remedy}"
            )
        if layer.reason is not None:
            raise PlanError(f"layer {label(name)} of the model cannot be replaced: {layer.reason}")
        if list(layer.weight) != spec["shape"] or layer.shape.conv_groups != spec["conv_groups"]:
            raise PlanError(
                f"layer {label(name)}: the file has weight shape {tuple(spec['shape'])}, the model {layer.weight}; "
                f"{_AS_COMPRESSED}"
            )
        new[name] = layer_of_fields(layer.module, spec)
    return replace_layers(model, new)


def assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put the tensors in the model's parameters and buffers, keeping which of these are one and the same."""
    expected = model.state_dict(keep_vars=True)
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise PlanError(
            f"the file is of another model: missing {missing[:3]}, unexpected {extra[:3]}; {_AS_COMPRESSED}"
        )
    for name, old in expected.items():
        if old.shape != tensors[name].shape:
            shapes = f"the file has shape {tuple(tensors[name].shape)}, the model {tuple(old.shape)}"
            raise PlanError(f"{name!r}: {shapes}; {_AS_COMPRESSED}")
    fresh: dict[int, Tensor] = {}
    shared = {key for pair in overlaps({id(t): t for t in expected.values()}) for key in pair}
    for path, module in model.named_modules():
        for attribute, old in [*module._parameters.items(), *module._buffers.items()]:
            name = f"{path}.{attribute}" if path else attribute
            if old is None or name not in tensors:
                continue
            if id(old) not in fresh:
                fresh[id(old)] = _fill(name, old, tensors[name], id(old) in shared)
            (module._parameters if attribute in module._parameters else module._buffers)[attribute] = fresh[id(old)]
    for name, old in expected.items():  # tied in the model means equal in the file
        if id(old) in fresh and not _same(fresh[id(old)], tensors[name]):
            raise PlanError(
                f"{name!r} shares memory in the model, but not in the file; pass the model that was compressed"
            )


def _fill(name: str, old: Tensor, value: Tensor, shares_memory: bool) -> Tensor:
    """What takes the tensor's place: the file's, or the model's own with the file's values if it shares memory."""
    if not shares_memory:
        value = value.to(torch.device("cpu") if old.is_meta else old.device)
        return nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    if old.dtype != value.dtype:
        raise PlanError(
            f"{name!r} shares memory and is {old.dtype} in the model, {value.dtype} in the file; convert the model"
        )
    with torch.no_grad():
        return old.copy_(value)


def _same(a: Tensor, b: Tensor) -> bool:
    return crc32(a) == crc32(b)


@explaining(
    model="model= is missing: a file has weights and no code; pass the dense torch.nn.Module, untrained will do, or a "
    "function without arguments that returns it"
)
def load(path: str | os.PathLike[str], model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Rebuild a saved compressed model on a fresh dense one; outputs are bit-equal to those of the saved model.

    Args:
        path: a file written by :func:`save`.
        model: the dense model (not changed; its weights do not matter and may be on the meta device), or a function
            without arguments that builds it.

    Returns:
        A new model with the file's structure, values and types, on the devices of ``model`` (CPU for meta), in
        evaluation mode: ``.train()`` it to train it.

    Raises:
        MissingFileError, FileFormatError: no such file; truncated, corrupt, of another format or a newer version.
        LayerNotFoundError, PlanError: the file is of another model.
    """
    header = read_header(path)
    try:
        dense = model if isinstance(model, nn.Module) else model() if callable(model) else None
    except TypeError as e:
        raise ModelError(f"model: the function that builds it failed: {e}") from e
    if not isinstance(dense, nn.Module):
        raise ModelError("model: pass the dense torch.nn.Module or a function without arguments that returns it")
    small = rebuild(dense, header["layers"], header["narrowed"])
    assign(small, read_tensors(path, header))
    without_values = [n for n, t in [*small.named_parameters(), *small.named_buffers()] if t.is_meta]
    if without_values:
        raise ModelError(
            f"{without_values[0]!r} is on the meta device and not in the file; build the model on a real device"
        )
    if header["plan"] is not None:
        annotate(small, plan=header["plan"])
    keep_when_saved(small)
    return small.eval()
