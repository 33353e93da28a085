"""Whether the input of a job is still what it was: its tensors, asked for where files have changed, and its data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from zlib import crc32

from ...errors import ArgumentError, FileFormatError
from ...files import write_whole
from ...measurement import Sensitivity, digest_of
from ..safetensors_reader import Shards
from .journal import Journal

RECORD = "input.json"


def _stamps(shards: Shards) -> dict[str, list[int]]:
    stats = {file.name: file.stat() for file in shards.files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _changed_error(name: str, journal: Journal) -> ArgumentError:
    return ArgumentError(
        f"the tensor {name!r} has changed since this job began; remove {str(journal.output)!r} and begin again, or "
        f"name another directory"
    )


def record_checksums(
    shards: Shards, journal: Journal, passing: Iterable[str], known: Mapping[str, int]
) -> dict[str, int]:
    """CRC-32 of the tensors that pass through as they are, made when the job begins and kept in the journal.

    Where a file has been written since, its tensors are compared with that, and with what is ``known`` of the weights
    that were analysed; ArgumentError if one has changed. In one process only.
    """
    path, stamps = journal.folder / RECORD, _stamps(shards)
    record: dict[str, dict[str, Any]] = {"files": {}, "tensors": {}}
    if path.exists():
        try:
            record = {"files": {}, "tensors": {}, **json.loads(path.read_text())}
        except (ValueError, TypeError) as e:
            raise FileFormatError(f"{str(path)!r} is damaged ({e}); remove {str(journal.output)!r}") from e
    old: dict[str, int] = record["tensors"]
    for name, stored in shards.tensors.items():
        expected = old.get(name, known.get(name))
        touched = record["files"].get(stored.file.name) != stamps[stored.file.name]
        if expected is not None and touched and stored.crc32() != expected:
            raise _changed_error(name, journal)
    sums = {name: old[name] if name in old else shards.tensors[name].crc32() for name in passing}
    write_whole(path, [json.dumps({"files": stamps, "tensors": {**old, **sums}}).encode()])
    return sums


def read_record(journal: Journal) -> dict[str, int]:
    """What :func:`record_checksums` has kept."""
    record: dict[str, int] = json.loads((journal.folder / RECORD).read_text())["tensors"]
    return record


def check_unchanged(shards: Shards, journal: Journal) -> None:
    """ArgumentError unless all tensors are those of the finished job; reads all of them."""
    for name, crc in journal.finished().items():
        if name not in shards.tensors or shards.tensors[name].crc32() != crc:
            raise _changed_error(name, journal)


def check_crc32(pieces: Iterable[bytes], crc: int, message: str) -> Iterator[bytes]:
    """The pieces; FileFormatError at their end if their CRC-32 is another."""
    total = 0
    for piece in pieces:
        total = crc32(piece, total)
        yield piece
    if total != crc:
        raise FileFormatError(message)


def batches_digest(batches: Sequence[Any]) -> str:
    """What tells these batches from others."""
    return hashlib.blake2b(b"".join(map(digest_of, batches)), digest_size=16).hexdigest()


def sensitivity_text(sensitivity: Sensitivity) -> str:
    """What tells it from others: of a function its name and its code."""
    if not callable(sensitivity):
        return str(sensitivity)
    code = getattr(sensitivity, "__code__", None)
    if code is None:
        raise ArgumentError(
            f"sensitivity= is a {type(sensitivity).__name__}, which nothing tells from others when a job goes on: "
            f"pass a function"
        )
    text = repr((code.co_code, code.co_names, [str(c) for c in code.co_consts if not hasattr(c, "co_code")]))
    return f"{sensitivity.__module__}.{sensitivity.__qualname__} {hashlib.blake2b(text.encode()).hexdigest()[:16]}"
