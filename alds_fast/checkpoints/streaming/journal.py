"""What a job on a checkpoint directory has finished: one small file a layer, each whole or not there.

The journal is the folder ``.alds_fast`` inside the output directory. Killed at any moment and started again with the
same arguments, a job goes on from what is in it; with other arguments, or for an input that has changed, it is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ...errors import ArgumentError, FileFormatError, MissingFileError
from ...files import crc32, locked, sync_folder, whole_or_nothing, write_whole
from ..pretrained import PLAN
from ..safetensors_reader import CODES, Stored, stored_in
from ..safetensors_writer import Entry, write_shard

FOLDER, JOB, LOCK = ".alds_fast", "alds_job.json", "lock"
LATER = {"budget", "p", "include", "exclude", "max_shard_bytes", "float32"}  # matter from the plan on
DONE = {"files", "tensors"}  # in the file of a finished job: the output's sizes and the input's checksums


CHANGED = "changed"  # what is a result of the whole job: tensors in the place of the input's, by their names there
WIDE = "wide"  # how kinds begin that are no results: parameters in float32, of the dense model and of others


def _text(job: Mapping[str, Any]) -> str:
    return json.dumps(job, indent=1, sort_keys=True) + "\n"


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], here: str = "then", there: str = "now") -> str:
    keys = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
    return ", ".join(f"{k}={old.get(k)!r} {here}, {new.get(k)!r} {there}" for k in keys)


class Journal:
    """The journal of the job in an output directory; ``job`` says what it is, in JSON's types."""

    def __init__(self, output: Path, job: Mapping[str, Any]) -> None:
        self.output, self.job, self.folder = output, job, output / FOLDER

    def check_same(self, jobs: Sequence[Mapping[str, Any]]) -> None:
        """ArgumentError unless those are this job: all processes must be given the same."""
        other = next((job for job in jobs if job != self.job), None)
        if other is not None:
            apart = _differences(self.job, other, "here", "there")
            raise ArgumentError(f"the processes of this job are given different arguments ({apart}); give all the same")

    def check(self) -> bool:
        """Whether the job is finished. ArgumentError if the directory holds anything but this job's work."""
        if self.output.exists() and not self.output.is_dir():
            raise ArgumentError(f"the output {str(self.output)!r} is a file; name a directory")
        if not self.output.parent.is_dir():
            raise MissingFileError(f"the directory {str(self.output.parent)!r} does not exist; create it first")
        finished, begun = self.output / JOB, self.folder / JOB
        if finished.exists():
            self._compare(finished, set())
            return True
        if begun.exists() and not self._has_results():
            return False
        if begun.exists():
            self._compare(begun, set() if (self.folder / PLAN).exists() else LATER)
            return False
        if any(self.folder.glob("*.safetensors")):
            raise ArgumentError(f"the journal in {str(self.output)!r} has lost its {JOB}; remove that directory")
        held = [p.name for p in self.output.iterdir() if p.name != FOLDER] if self.output.exists() else []
        if held:
            raise ArgumentError(
                f"the output directory {str(self.output)!r} is not empty (it holds {sorted(held)[0]!r}); name a new one"
            )
        return False

    def _has_results(self) -> bool:
        found = [path for path in self.folder.glob("*.safetensors") if f".{WIDE}" not in path.name]
        return (self.folder / PLAN).exists() or bool(found)

    def _read(self, place: Path) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(place.read_text())
            return dict(content)
        except (ValueError, TypeError) as e:
            raise FileFormatError(f"{str(place)!r} is damaged ({e}); remove {str(self.output)!r}") from e

    def finished(self) -> dict[str, int]:
        """CRC-32 of the input's tensors when the job was finished; FileFormatError if a file of the output is gone."""
        record = self._read(self.output / JOB)
        for name, size in record.get("files", {}).items():
            path = self.output / name
            if not path.is_file() or path.stat().st_size != size:
                raise FileFormatError(f"{str(path)!r} is gone or damaged; remove {str(self.output)!r} and begin again")
        return dict(record.get("tensors", {}))

    def _compare(self, place: Path, free: set[str]) -> None:
        old = {k: v for k, v in self._read(place).items() if k not in DONE}
        if {k: v for k, v in old.items() if k not in free} != {k: v for k, v in self.job.items() if k not in free}:
            raise ArgumentError(
                f"the output directory {str(self.output)!r} holds another job ({_differences(old, self.job)}); name "
                f"another directory, or remove that one"
            )

    def begin(self) -> None:
        """Make the journal, or go on with the one there; in the process that has locked it."""
        with whole_or_nothing(self.output):
            for partial in [*self.folder.glob("*.partial"), *self.output.glob("*.partial")]:
                partial.unlink()
        if not (self.folder / JOB).exists() or self._read(self.folder / JOB) != self.job:
            if not self._has_results():  # another job failed before it came to anything
                for path in self.folder.iterdir():
                    if path.name != LOCK:
                        path.unlink()
            write_whole(self.folder / JOB, [_text(self.job).encode()])

    @contextmanager
    def lock(self) -> Iterator[None]:
        """No other job works in this directory meanwhile; ArgumentError if one does already."""
        with whole_or_nothing(self.output):
            self.output.mkdir(exist_ok=True)
            self.folder.mkdir(exist_ok=True)
        with locked(self.folder / LOCK) as alone:
            if not alone:
                raise ArgumentError(f"another process is at work in {str(self.output)!r}; wait for it, or stop it")
            yield

    def path(self, kind: str, number: int) -> Path:
        """File of a ``kind`` of result of layer ``number``."""
        return self.folder / f"{number:06d}.{kind}.safetensors"

    def has(self, kind: str, number: int) -> bool:
        """Whether that result is there."""
        return self.path(kind, number).exists()

    def put(self, kind: str, number: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Keep a result; FileWriteError if it cannot be written."""
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        entries = [
            Entry(name, CODES[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for name, t in whole.items()
        ]

        def content(entry: Entry) -> list[memoryview]:
            return [whole[entry.name].view(-1).view(torch.uint8).numpy().data]

        write_shard(self.path(kind, number), entries, content, {"notes": json.dumps(notes)})

    def get(self, kind: str, number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A result and its notes; FileFormatError if its file is damaged."""
        with self._open(kind, number) as file:
            return load_file(self.path(kind, number)), json.loads((file.metadata() or {})["notes"])

    def notes(self, kind: str, number: int) -> Any:
        """The notes of a result; as :meth:`get`."""
        with self._open(kind, number) as file:
            return json.loads((file.metadata() or {})["notes"])

    def names(self, kind: str, number: int) -> list[str]:
        """The names of a result's tensors; as :meth:`get`."""
        with self._open(kind, number) as file:
            return list(file.keys())

    def some(self, kind: str, number: int, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Some tensors of a result, mapped out of its file, under other names; as :meth:`get`."""
        with self._open(kind, number) as file:
            return {key: file.get_tensor(name) for key, name in names.items()}

    @contextmanager
    def _open(self, kind: str, number: int) -> Iterator[Any]:
        path = self.path(kind, number)
        try:
            with safe_open(path, "pt") as file:
                yield file
        except (SafetensorError, KeyError, ValueError, OSError) as e:
            raise FileFormatError(f"{str(path)!r} is damaged ({e}); remove it and run the same command again") from e

    def drop(self, kind: str, number: int) -> None:
        """Forget a result."""
        self.path(kind, number).unlink(missing_ok=True)

    def finish(self, tensors: Mapping[str, int]) -> None:
        """Mark the job as finished and remove the journal; ``tensors`` holds the CRC-32 of the input's."""
        files = {p.name: p.stat().st_size for p in self.output.iterdir() if p.is_file() and p.name != JOB}
        write_whole(self.output / JOB, [_text({**self.job, "files": files, "tensors": dict(tensors)}).encode()])
        self.clean()

    def clean(self) -> None:
        """Remove what is left of the journal of a finished job."""
        with contextlib.suppress(FileNotFoundError):
            (self.folder / JOB).unlink()
        shutil.rmtree(self.folder, ignore_errors=True)
        sync_folder(self.output)
        if self.folder.exists():
            os.rmdir(self.folder)


def put_changed(journal: Journal, tensors: Mapping[str, Tensor]) -> None:
    """Tensors that go to the output in the place of the input's, by their names there."""
    journal.put(CHANGED, 0, tensors, {name: crc32(tensor) for name, tensor in tensors.items()})


def changed_tensors(journal: Journal) -> dict[str, tuple[Stored, int]]:
    """What :func:`put_changed` has kept, with checksums."""
    if not journal.has(CHANGED, 0):
        return {}
    stored = stored_in(journal.path(CHANGED, 0))
    return {name: (stored[name], int(crc)) for name, crc in journal.notes(CHANGED, 0).items()}
