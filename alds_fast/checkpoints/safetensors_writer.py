"""Writing a safetensors file a piece at a time, under another name until it is whole."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import FileWriteError


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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """FileWriteError, saying what to do, where the system refuses to write."""
    try:
        yield
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space" if full else "mend that"
        raise FileWriteError(
            f"{str(path)!r} could not be written ({e.strerror or e}); what was finished before is kept: {remedy} and "
            f"run the same command again to go on"
        ) from e


def sync_folder(folder: Path) -> None:
    """Make names given to files in a folder survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_whole(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file under another name, put it on disk, then give it its own; what stood there before is replaced."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            with open(partial, "wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        sync_folder(path.parent)


def write_shard(
    path: Path,
    entries: Sequence[Entry],
    content: Callable[[Entry], Iterable[bytes | memoryview]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file of these tensors, whose bytes ``content`` gives; FileWriteError if that fails."""

    def pieces() -> Iterator[bytes | memoryview]:
        yield header(entries, metadata or {})
        for entry in entries:
            size = 0
            for piece in content(entry):
                size += len(piece)
                yield piece
            assert size == entry.size, f"{entry.name}: {size} bytes instead of {entry.size}"

    write_whole(path, pieces())
