"""Reading a checkpoint directory: safetensors shards, their index and config.json, a tensor at a time."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ArgumentError, FileFormatError, MissingFileError

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
CHUNK = 1 << 24  # bytes copied at a time
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its type as safetensors calls it, its shape, and its first byte and length in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def tensor(self) -> Tensor:
        """Its values, in memory of their own; ArgumentError for a type that torch does not have."""
        if self.dtype not in DTYPES:
            raise ArgumentError(f"{self.file.name}: a tensor of type {self.dtype} cannot be decomposed; convert it")
        room = torch.empty(self.size, dtype=torch.uint8, device="cpu")
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            read, view = 0, room.numpy().data
            while read < self.size and (count := file.readinto(view[read:])):
                read += count
        if read < self.size:
            raise FileFormatError(f"{str(self.file)!r} ends in the middle of a tensor; it changed while it was read")
        return room.view(DTYPES[self.dtype]).view(self.shape)

    def crc32(self) -> int:
        """CRC-32 of its bytes."""
        return functools.reduce(lambda crc, piece: zlib.crc32(piece, crc), self.chunks(), 0)

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, a piece at a time."""
        with open(self.file, "rb") as file:
            file.seek(self.start)
            remaining = self.size
            while remaining:
                piece = file.read(min(remaining, CHUNK))
                if not piece:
                    raise FileFormatError(
                        f"{str(self.file)!r} ends in the middle of a tensor; it changed while it was read"
                    )
                remaining -= len(piece)
                yield piece


@dataclass(frozen=True)
class Shards:
    """A checkpoint directory: its tensors by name, in the order of the files, the model's config, and what it is."""

    folder: Path
    tensors: Mapping[str, Stored]
    config: dict[str, Any]
    fingerprint: str

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return list(dict.fromkeys(stored.file for stored in self.tensors.values()))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise FileFormatError(f"{str(path)!r} is not JSON ({e}); copy the checkpoint again") from e
    except FileNotFoundError as e:
        raise MissingFileError(f"{str(path)!r} does not exist: a checkpoint directory holds it") from e
    if not isinstance(content, dict):
        raise FileFormatError(f"{str(path)!r} holds a {type(content).__name__}, not an object")
    return content


def _shard_names(folder: Path) -> dict[str, list[str]]:
    """Every file with the tensors that the index places in it; none are named for a single file."""
    if (folder / SINGLE).is_file():  # which counts for transformers, whatever index an earlier save has left
        return {SINGLE: []}
    if not (folder / INDEX).exists():
        raise MissingFileError(
            f"{str(folder)!r} holds neither {SINGLE} nor {INDEX}; save the model there in the safetensors format "
            f"(save_pretrained does)"
        )
    placed = _json(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise FileFormatError(f"{str(folder / INDEX)!r} has no weight_map of names to files")
    files: dict[str, list[str]] = {file: [] for file in sorted(set(placed.values()))}
    for name, file in placed.items():
        files[file].append(name)
    for file in files:
        if Path(file).name != file:
            raise FileFormatError(f"{str(folder / INDEX)!r}: {file!r} is not the name of a file in that directory")
        if not (folder / file).is_file():
            raise MissingFileError(f"the shard {str(folder / file)!r} that {INDEX} names does not exist; copy it again")
    return files


def stored_in(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name, in the order of their bytes; FileFormatError if it is not whole."""
    return _header(path)[0]


def _header(path: Path) -> tuple[dict[str, Stored], str]:
    """The tensors of a safetensors file by name, in the order of their bytes, and what identifies the header."""
    try:
        with safe_open(path, "pt"):  # checks the header against the file's size
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(length)
    except (SafetensorError, OSError) as e:
        raise FileFormatError(f"{str(path)!r} is not a whole safetensors file ({e}); copy it again") from e
    entries = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
    ordered = sorted(entries.items(), key=lambda item: (*item[1]["data_offsets"], item[0]))
    tensors = {}
    for name, entry in ordered:
        begin, end = entry["data_offsets"]
        tensors[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return tensors, f"{path.name} {os.path.getsize(path)} {hashlib.sha256(raw).hexdigest()}"


def _existing(folder: object) -> Path:
    """The directory; MissingFileError with what to do if it is not there, ArgumentError if it is no name of one."""
    if not isinstance(folder, str | os.PathLike):
        raise ArgumentError(f"the checkpoint directory is a {type(folder).__name__}: expected the name of a directory")
    name = os.fspath(folder)
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise ArgumentError(f"{name!r} is a file, not a directory; load(file, model) loads what save has written")
    hub = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name))
    remedy = (f"; it must be a local directory: huggingface_hub.snapshot_download({name!r}) downloads a model of that "
              f"name and returns its directory") if hub else ""  # fmt: skip
    raise MissingFileError(f"the checkpoint directory {name!r} does not exist{remedy}")


def open_shards(folder: str | os.PathLike[str]) -> Shards:
    """Open a checkpoint directory; only the files' headers are read.

    Raises:
        ArgumentError: ``folder`` is not the name of a directory.
        MissingFileError: the directory, its config.json, its index or a shard that the index names does not exist.
        FileFormatError: one of them is truncated or corrupt, or a tensor is in no file or in two.
    """
    folder = _existing(folder)
    config = _json(folder / CONFIG)
    tensors: dict[str, Stored] = {}
    identities = []
    for file, names in _shard_names(folder).items():
        in_file, identity = _header(folder / file)
        identities.append(identity)
        lost = [name for name in names if name not in in_file]
        if lost:
            raise FileFormatError(f"{str(folder / file)!r} lacks the tensor {lost[0]!r} that {INDEX} places in it")
        twice = [name for name in in_file if name in tensors]
        if twice:
            raise FileFormatError(f"the tensor {twice[0]!r} is in {tensors[twice[0]].file.name!r} and in {file!r}")
        tensors |= in_file
    whole = json.dumps([identities, config], sort_keys=True)
    return Shards(folder, tensors, config, hashlib.sha256(whole.encode()).hexdigest())
