"""The file an evaluation resumes from: one line of JSON per run and per finished cell, each on disk before the next."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, FileFormatError, MissingFileError
from ..files import whole_or_nothing
from ..text import number

FORMAT = "alds_fast.evaluation"
VERSION = 1
NAME = "results.jsonl"
Record = dict[str, Any]


def json_record(record: Record) -> Record:
    """A record as JSON takes it: "inf" for infinity, null for NaN."""
    return {k: number(v) if isinstance(v, float) else v for k, v in record.items()}


class Records:
    """The records of a folder, or of nothing but memory where ``folder`` is None.

    Attributes:
        by_key: the latest record of every cell.
        marks: the mark of the dense model by seed.
        setting: :attr:`alds_fast.evaluation.cells.Task.setting` of all its runs, None in a new file.
        variants: names in the order in which they were first asked for.
    """

    def __init__(self, folder: Path | None) -> None:
        self.by_key: dict[str, Record] = {}
        self.marks: dict[int, str] = {}
        self.setting: Record | None = None
        self.variants: list[str] = []
        self._head: Record | None = None  # what says that a run began, until it is written
        self.path = None if folder is None else folder / NAME
        if self.path is not None and self.path.is_file():
            for line in self._lines(self.path):
                self._take(line)

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Records:
        """Those of a folder that holds some; MissingFileError if it does not, FileFormatError for another file."""
        path = Path(folder)
        if not (path / NAME).is_file():
            raise MissingFileError(f"{os.fspath(folder)!r} holds no {NAME}; give the out= folder of an evaluation")
        return cls(path)

    def _lines(self, path: Path) -> list[str]:
        """All whole lines; a last one without its end was cut off while it was written and does not count."""
        text = path.read_bytes()
        self._whole = text.rfind(b"\n") + 1
        try:
            return text[: self._whole].decode().splitlines()
        except UnicodeDecodeError as e:
            raise FileFormatError(f"{str(path)!r} is not a text file") from e

    def _take(self, line: str) -> None:
        try:
            data = json.loads(line)
            if "format" in data:
                if (data["format"], data["version"]) != (FORMAT, VERSION):
                    raise ValueError(f"it is {data['format']!r} version {data['version']!r}")
                self.setting = dict(data["setting"])
                self.variants += [name for name in data["variants"] if name not in self.variants]
                return
            if data["p"] == "inf":
                data["p"] = math.inf
            self.marks[int(data["seed"])] = data.pop("model")
            self._keep(data)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise FileFormatError(f"{str(self.path)!r} is not what an evaluation wrote: {e!r}") from e

    def start(self, setting: Record, variants: Sequence[str]) -> None:
        """Begin a run; ArgumentError if the file is of another setting."""
        for name, value in (self.setting or {}).items():
            if value != setting.get(name):
                raise ArgumentError(
                    f"{str(self.path)!r} was evaluated with {name}={value!r}, not {setting.get(name)!r}; choose "
                    f"another out= folder"
                )
        self.setting = setting
        self.variants += [name for name in variants if name not in self.variants]
        self._head = {"format": FORMAT, "version": VERSION, "setting": setting, "variants": list(variants)}

    def _keep(self, record: Record) -> None:
        self.by_key.pop(record["key"], None)  # the latest comes last
        self.by_key[record["key"]] = record

    def check(self, seed: int, mark: str) -> None:
        """ArgumentError unless the seed's model is the one whose results are here."""
        known = self.marks.setdefault(seed, mark)
        if known == mark:
            return
        if self.path is None:
            where = "was built twice with different weights; model(seed) must return the same model every time"
        else:
            where = f"is not the one of {str(self.path)!r}; choose another out= folder, or load the same weights"
        raise ArgumentError(f"the model of seed {seed} ({mark}, before: {known}) {where}")

    def add(self, record: Record) -> None:
        """Keep a record, on disk when this returns."""
        if self._head is not None:  # only now: a run that is refused leaves the file as it is
            if self.path is not None and self.path.is_file():
                os.truncate(self.path, self._whole)
            self._write(self._head)
            self._head = None
        self._keep(record)
        self._write({**json_record(record), "model": self.marks[record["seed"]]})

    def _write(self, data: Record) -> None:
        if self.path is None:
            return
        with whole_or_nothing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(data) + "\n")
            file.flush()
            os.fsync(file.fileno())
