"""Where files go."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ArgumentError, MissingFileError


def target_file(path: str | os.PathLike[str]) -> Path:
    """The file to write, links resolved; refused unless it is a regular file or nothing, in a directory that exists."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or "\0" in os.fspath(path):
        raise ArgumentError(f"path={path!r}: expected the name of a file")
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise MissingFileError(f"the directory {str(target.parent)!r} does not exist; create it first")
    if target.exists() and not target.is_file():
        raise ArgumentError(f"path={os.fspath(path)!r} is a directory or a device, not a file")
    return target
