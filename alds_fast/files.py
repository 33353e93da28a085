"""The writer of files: each is whole or not there. Checksums are CRC-32.

(The log of an evaluation is appended to, a line at a time, by itself.)
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .errors import ArgumentError, FileWriteError, MissingFileError

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]


def cache_folder() -> Path:
    """Where what was measured is kept between processes: ``$ALDS_FAST_CACHE`` or ``~/.cache/alds_fast``."""
    return Path(os.environ.get("ALDS_FAST_CACHE") or Path.home() / ".cache" / "alds_fast")


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


def crc32(tensor: Tensor) -> int:
    """CRC-32 of a tensor's values in their usual order."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


@contextmanager
def atomic(target: Path, temporary: str | None = None) -> Iterator[str]:
    """A temporary file beside the target, of that or a new name, that replaces it once it is whole and on disk."""
    if temporary is None:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~mask)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """:func:`atomic`, with a FileWriteError where the system refuses."""
    try:
        with atomic(Path(path)) as temporary:
            yield temporary
    except OSError as e:
        raise FileWriteError(
            f"{os.fspath(path)!r} could not be written ({e.strerror or e}); what stood there before is unchanged"
        ) from e


@contextmanager
def locked(path: Path, seconds: float = 0.0) -> Iterator[bool]:
    """Whether this file, which is made and stays, could be locked; who holds the lock is waited for, so long at most.

    A lock ends with its process.
    """
    with open(path, "a") as file:
        end, alone = time.monotonic() + seconds, fcntl is None
        while not alone:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                if time.monotonic() >= end:
                    break
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
        yield alone


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[None]:
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
    """Write a file of a job that can go on: :func:`atomic`, under a name that a killed process leaves only once."""
    with whole_or_nothing(path):
        with atomic(path, f"{path}.partial") as temporary, open(temporary, "wb") as file:
            for piece in pieces:
                file.write(piece)
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all; FileWriteError where the system refuses."""
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
