"""Results that are written as a table, as numbers or as a picture, by the ending of the file's name."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

from ..errors import ArgumentError
from ..files import target_file, write_text

PICTURES = (".png", ".pdf", ".svg")


class Saved(ABC):
    """Something with ``save``."""

    @abstractmethod
    def to_markdown(self) -> str:
        """The table in Markdown, and what it holds for."""

    @abstractmethod
    def to_json(self) -> str:
        """Everything as JSON text."""

    @abstractmethod
    def _draw(self, path: Path) -> None: ...

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table (.md), all numbers (.json) or a picture of the ratios (.png, .pdf, .svg), as a whole.

        Raises ArgumentError for another ending, or for a picture without matplotlib; MissingFileError if the directory
        does not exist.
        """
        target = target_file(path)
        texts = {".md": self.to_markdown, ".json": self.to_json}
        ending = target.suffix.lower()
        if ending in texts:
            write_text(target, texts[ending]())
        elif ending in PICTURES:
            self._draw(target)
        else:
            raise ArgumentError(f"path={os.fspath(path)!r} does not end in .md, .json, .png, .pdf or .svg")
