"""The file of a saved model: one safetensors file, its metadata, and how it is written and read.

The header's metadata holds a format version, the structure of every low-rank layer, the plan, which tensors share
memory, the memory order of tensors that are not contiguous, and a CRC-32 of every tensor.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ArgumentError, FileFormatError, MissingFileError
from ..files import crc32
from ..integrations import check_narrowed
from ..linalg import Decomposition, own_memory
from ..planning import Plan

FORMAT, ANALYSIS = "alds_fast.checkpoint", "alds_fast.analysis"
WRITERS = {FORMAT: "save", ANALYSIS: "save_analysis"}
VERSION = 3  # 2 without int8 factors, 1 where no layer lost hidden units either: older versions of the library read it


def memory_order(tensor: Tensor) -> list[int] | None:
    """Dimensions from the slowest to the fastest in memory, None if that is the usual order or not a permutation."""
    if tensor.is_contiguous():
        return None
    order = sorted(range(tensor.dim()), key=lambda d: (tensor.stride()[d], tensor.shape[d]), reverse=True)
    return order if tensor.permute(order).is_contiguous() else None


def own_storages(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, each the whole of a storage of its own, as safetensors wants them."""
    copies: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
        kept = whole and storage.data_ptr() not in taken
        copies[name] = tensor if kept else tensor.clone(memory_format=torch.contiguous_format)
        taken.add(storage.data_ptr())
    return copies


def read_metadata(path: str | os.PathLike[str], form: str, version: int) -> dict[str, str]:
    """The metadata of a safetensors file of a format of ``WRITERS``, at most of that version.

    Raises MissingFileError, or FileFormatError if the file is truncated, not safetensors, of another format, or newer.
    """
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"path={path!r}: expected the name of a file")
    if not Path(path).is_file():
        remedy = "; from_pretrained loads compressed directories" if Path(path).is_dir() else ""
        raise MissingFileError(f"{os.fspath(path)!r} does not exist or is not a file{remedy}")
    try:
        with safe_open(path, "pt") as f:
            metadata: dict[str, str] = f.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise FileFormatError(f"{os.fspath(path)!r} is not a whole safetensors file ({e}); save it again") from e
    if metadata.get("format") != form:
        other = WRITERS.get(metadata.get("format", ""))
        raise FileFormatError(
            f"{os.fspath(path)!r} was not written by alds_fast.{WRITERS[form]}: "
            + (f"alds_fast.{other} did" if other else "it has no alds_fast metadata")
        )
    try:
        known = int(metadata["version"]) <= version
    except (KeyError, ValueError) as e:
        raise FileFormatError(f"{os.fspath(path)!r} has damaged metadata ({e}); save it again") from e
    if not known:
        raise FileFormatError(
            f"{os.fspath(path)!r} has format version {metadata['version']}, newer than {version}; update alds_fast"
        )
    return metadata


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a saved model, parsed: layers, narrowed, aliases, orders, crc32, plan (Plan or None).

    Raises MissingFileError and FileFormatError as :func:`read_metadata`.
    """
    metadata = read_metadata(path, FORMAT, VERSION)
    try:
        parsed: dict[str, Any] = {k: json.loads(metadata[k]) for k in ("layers", "aliases", "orders", "crc32")}
        parsed["narrowed"] = json.loads(metadata.get("narrowed", "{}"))
        parsed["plan"] = Plan.from_json(metadata["plan"]) if metadata["plan"] else None
        _check_header(parsed)
    except (KeyError, TypeError, ValueError) as e:
        raise FileFormatError(f"{os.fspath(path)!r} has damaged metadata ({e}); save it again") from e
    return parsed


def _check_header(header: dict[str, Any]) -> None:
    """ValueError unless every part has its type."""
    check_narrowed(header["narrowed"])
    for name in ("layers", "aliases", "orders", "crc32"):
        if not isinstance(header[name], dict):
            raise ValueError(f"{name} is not an object")
    for name, spec in header["layers"].items():
        if not isinstance(spec, dict) or type(spec.get("conv_groups")) is not int or "shape" not in spec:
            raise ValueError(f"layer {name!r} is incomplete")
        Decomposition.from_dict(spec)
    if not all(isinstance(kept, str) for kept in header["aliases"].values()):
        raise ValueError("an alias is not a name")
    for name, order in header["orders"].items():
        if not isinstance(order, list) or sorted(order) != list(range(len(order))):
            raise ValueError(f"the memory order of {name!r} is {order!r}")


def read_tensors(path: str | os.PathLike[str], header: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of a saved model by name, repeated ones included, checked, each in its memory order."""
    tensors = {}
    with safe_open(path, "pt") as f:
        for name in f.keys():  # noqa: SIM118 (safe_open is not a dict)
            tensor = own_memory(f.get_tensor(name))
            if crc32(tensor) != header["crc32"].get(name):
                raise FileFormatError(
                    f"{os.fspath(path)!r}: tensor {name!r} is corrupt (CRC-32 differs); save it again"
                )
            order = header["orders"].get(name)
            if order is not None and len(order) != tensor.dim():
                raise FileFormatError(f"{os.fspath(path)!r}: the memory order of {name!r} is damaged; save it again")
            tensors[name] = tensor if order is None else tensor.permute([order.index(d) for d in range(len(order))])
    lost = [kept for kept in header["aliases"].values() if kept not in tensors]
    if lost:
        raise FileFormatError(
            f"{os.fspath(path)!r}: a tensor shares the memory of {lost[0]!r}, which is missing; save it again"
        )
    return {**tensors, **{alias: tensors[kept] for alias, kept in header["aliases"].items()}}
