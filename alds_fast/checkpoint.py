"""Save and load compressed models: one safetensors file, no pickle.

The header's metadata holds a format version, the structure of every low-rank layer, the plan, which tensors share
memory, the memory order of tensors that are not contiguous, and a CRC-32 of every tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .discover import label
from .errors import FileFormatError, FileWriteError, LayerNotFoundError, MissingFileError, ModelError, PlanError
from .layers import LowRankLayer
from .plan import Plan
from .replace import low_rank_like, replace_layers, weight_shape

FORMAT = "alds_fast.checkpoint"
VERSION = 1


def _crc32(tensor: Tensor) -> int:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def _memory_order(tensor: Tensor) -> list[int] | None:
    """Dimensions from the slowest to the fastest in memory, None if that is the usual order or not a permutation."""
    if tensor.is_contiguous():
        return None
    order = sorted(range(tensor.dim()), key=lambda d: (tensor.stride()[d], tensor.shape[d]), reverse=True)
    return order if tensor.permute(order).is_contiguous() else None


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state's tensors without repeats, and for every repeated name the name that is kept."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ModelError(f"state {name!r} is a {type(tensor).__name__}; only tensors can be saved in safetensors")
        if tensor.is_meta:
            raise ModelError(f"state {name!r} is on the meta device and has no values to save")
        storage = tensor.untyped_storage().data_ptr()
        key = (tensor.device, storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        first = seen.setdefault(key, name) if storage else name
        if first != name:
            aliases[name] = first
        else:
            kept[name] = tensor.detach()
    return kept, aliases


def _structure(model: nn.Module) -> dict[str, dict[str, Any]]:
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, LowRankLayer))
    return {
        n: {"shape": list(m.weight_shape.weight), "conv_groups": m.weight_shape.conv_groups, "kind": type(m).__name__,
            "scheme": m.scheme, "groups": m.groups, "rank": m.rank}
        for n, m in layers
    }  # fmt: skip


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a compressed model as one safetensors file, atomically: a killed save leaves the old file whole.

    Parameters and buffers are stored in their own types, shared ones once, with the plan and the layers' structure in
    the metadata. Raises ModelError if the model is not a compressed one or holds state that is not a tensor,
    MissingFileError if the directory does not exist, FileWriteError if the file cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is a {type(model).__name__}; pass the torch.nn.Module itself")
    structure, plan = _structure(model), getattr(model, "alds_plan", None)
    if not structure and not isinstance(plan, Plan):
        raise ModelError("the model has no low-rank layer and no plan: it was not made by compress() or Plan.apply()")
    tensors, aliases = _unique_tensors(model)
    orders = {n: order for n, t in tensors.items() if (order := _memory_order(t)) is not None}
    stored = {n: t.cpu().permute(orders[n]) if n in orders else t.cpu() for n, t in tensors.items()}
    stored = {n: _own(t) for n, t in stored.items()}
    metadata = {
        "format": FORMAT, "version": str(VERSION), "layers": json.dumps(structure), "aliases": json.dumps(aliases),
        "orders": json.dumps(orders), "crc32": json.dumps({n: _crc32(t) for n, t in stored.items()}),
        "plan": plan.to_json() if isinstance(plan, Plan) else "",
    }  # fmt: skip
    target = Path(path)
    if not target.parent.is_dir():
        raise MissingFileError(f"the directory {str(target.parent)!r} does not exist; create it first")
    try:
        with _atomic(target) as temporary:
            save_file(stored, temporary, metadata)
    except (OSError, SafetensorError) as e:
        raise FileWriteError(f"{str(target)!r} could not be written ({e}); what stood there before is unchanged") from e


def _own(tensor: Tensor) -> Tensor:
    """A contiguous tensor that is the whole of its storage, as safetensors wants it."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def _atomic(target: Path) -> Iterator[str]:
    """A temporary file beside the target that replaces it once it is whole and on disk."""
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a saved model, parsed: format, version, layers, aliases, orders, crc32, plan (Plan or None).

    Raises MissingFileError, or FileFormatError if the file is truncated, not safetensors, not of this package, or
    newer.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"{os.fspath(path)!r} does not exist or is not a file")
    try:
        with safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise FileFormatError(f"{os.fspath(path)!r} is not a whole safetensors file ({e}); save it again") from e
    if metadata.get("format") != FORMAT:
        raise FileFormatError(f"{os.fspath(path)!r} was not written by alds_fast.save: it has no alds_fast metadata")
    try:
        if int(metadata["version"]) > VERSION:
            raise FileFormatError(
                f"{os.fspath(path)!r} has format version {metadata['version']}, newer than {VERSION}; update alds_fast"
            )
        parsed: dict[str, Any] = {k: json.loads(metadata[k]) for k in ("layers", "aliases", "orders", "crc32")}
        parsed["plan"] = Plan.from_json(metadata["plan"]) if metadata["plan"] else None
    except (KeyError, TypeError, ValueError) as e:
        if isinstance(e, FileFormatError):
            raise
        raise FileFormatError(f"{os.fspath(path)!r} has damaged metadata ({e}); save it again") from e
    return parsed


def _read_tensors(path: str | os.PathLike[str], header: dict[str, Any]) -> dict[str, Tensor]:
    tensors = {}
    with safe_open(path, "pt") as f:
        for name in f.keys():  # noqa: SIM118 (safe_open is not a dict)
            tensor = f.get_tensor(name)
            if _crc32(tensor) != header["crc32"].get(name):
                raise FileFormatError(
                    f"{os.fspath(path)!r}: tensor {name!r} is corrupt (CRC-32 differs); save it again"
                )
            order = header["orders"].get(name)
            tensors[name] = tensor if order is None else tensor.permute([order.index(d) for d in range(len(order))])
    return {**tensors, **{alias: tensors[kept] for alias, kept in header["aliases"].items()}}


def _rebuild(model: nn.Module, layers: dict[str, dict[str, Any]]) -> nn.Module:
    """A copy of the dense model with empty low-rank layers where the file has them."""
    modules = dict(model.named_modules())
    new = {}
    for name, spec in layers.items():
        dense = modules.get(name)
        shape = weight_shape(dense) if dense is not None else None
        if dense is None or shape is None:
            raise LayerNotFoundError(f"the file's layer {label(name)} is not a Linear or convolution of the model")
        if list(shape.weight) != spec["shape"] or shape.conv_groups != spec["conv_groups"]:
            raise PlanError(
                f"layer {label(name)}: the file has weight shape {tuple(spec['shape'])}, the model {shape.weight}"
            )
        new[name] = low_rank_like(dense, spec["scheme"], spec["groups"], spec["rank"])
    return replace_layers(model, new)


def _assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put the tensors in the model's parameters and buffers, keeping which of these are one and the same."""
    expected = model.state_dict(keep_vars=True)
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise PlanError(f"the file is of another model: missing {missing[:3]}, unexpected {extra[:3]}")
    for name, old in expected.items():
        if old.shape != tensors[name].shape:
            raise PlanError(f"{name!r}: the file has shape {tuple(tensors[name].shape)}, the model {tuple(old.shape)}")
    fresh: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        for own, old in [*module._parameters.items(), *module._buffers.items()]:
            name = f"{path}.{own}" if path else own
            if old is None or name not in tensors:
                continue
            if id(old) not in fresh:
                device = torch.device("cpu") if old.is_meta else old.device
                value = tensors[name].to(device)
                fresh[id(old)] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
            (module._parameters if own in module._parameters else module._buffers)[own] = fresh[id(old)]


def load(path: str | os.PathLike[str], model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Rebuild a saved compressed model on a fresh dense one; outputs are bit-equal to those of the saved model.

    Args:
        path: a file written by :func:`save`.
        model: the dense model (not changed; its weights do not matter and may be on the meta device), or a function
            without arguments that builds it.

    Returns:
        A new model with the file's structure, values and types, on the devices of ``model`` (CPU for meta), in its
        training mode.

    Raises:
        MissingFileError, FileFormatError: no such file; truncated, corrupt, of another format or a newer version.
        LayerNotFoundError, PlanError: the file is of another model.
    """
    header = read_header(path)
    dense = model if isinstance(model, nn.Module) else model() if callable(model) else None
    if not isinstance(dense, nn.Module):
        raise ModelError("model: pass the dense torch.nn.Module or a function without arguments that returns it")
    small = _rebuild(dense, header["layers"])
    _assign(small, _read_tensors(path, header))
    left = [n for n, t in [*small.named_parameters(), *small.named_buffers()] if t.is_meta]
    if left:
        raise ModelError(f"{left[0]!r} is on the meta device and not in the file; build the model on a real device")
    if header["plan"] is not None:
        object.__setattr__(small, "alds_plan", header["plan"])
    return small
