"""Writing a safetensors file a piece at a time, under another name until it is whole."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import write_whole


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its name, its type as safetensors calls it, its shape and its number of bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """The header of a safetensors file with these tensors one after the other, its length in front."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    begin = 0
    for entry in entries:
        offsets = [begin, begin + entry.size]
        fields[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        begin += entry.size
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def pieces(
    entries: Sequence[Entry],
    content: Callable[[Entry], Iterable[bytes | memoryview]],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[bytes | memoryview]:
    """A safetensors file of these tensors, whose bytes ``content`` gives, a piece at a time."""
    yield header(entries, metadata or {})
    for entry in entries:
        size = 0
        for piece in content(entry):
            size += len(piece)
            yield piece
        assert size == entry.size, f"{entry.name}: {size} bytes instead of {entry.size}"


def write_shard(
    path: Path,
    entries: Sequence[Entry],
    content: Callable[[Entry], Iterable[bytes | memoryview]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write :func:`pieces` as a file of a job; FileWriteError if that fails."""
    write_whole(path, pieces(entries, content, metadata))
