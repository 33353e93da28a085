"""What was measured, on disk: a file for every device, version of Triton and source of the kernels.

They are ``tilings/DEVICE-CAPABILITY-TRITON-SOURCE.json`` in ``$ALDS_FAST_CACHE`` or ``~/.cache/alds_fast``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...files import cache_folder, locked, write_text
from .keys import KERNELS, LaunchKey, Measured, Tiling

FORMAT = "alds_fast.tilings"
VERSION = 1
MAX_TILE = 1024
WAIT_FOR_OTHERS = 5.0  # seconds that a process waits for others that write the same file


@functools.cache
def _source_hash() -> str:
    """Of the kernels' source: a tiling that was verified with one is not known to be right with another."""
    texts = [file.read_bytes() for file in sorted((Path(__file__).parents[1] / "fused").glob("*.py"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:12]


def environment_of(device: torch.device) -> dict[str, str]:
    """What measured tilings hold for."""
    major, minor = torch.cuda.get_device_capability(device)
    version = importlib.import_module("triton").__version__
    name = torch.cuda.get_device_name(device)
    return {"device": name, "capability": f"{major}.{minor}", "triton": version, "source": _source_hash()}


def file_of(device: torch.device) -> Path:
    """Where a CUDA device's tilings are kept."""
    parts = (re.sub(r"[^A-Za-z0-9.]+", "_", text) for text in environment_of(device).values())
    return cache_folder() / "tilings" / f"{'-'.join(parts)}.json"


def write_tilings(device: torch.device, known: Mapping[LaunchKey, Measured]) -> None:
    """The device's file, written whole, with what others have added meanwhile; a warning where that cannot be."""
    file: Path | str = "~/.cache/alds_fast"
    names = {kind: name for name, kind in KERNELS.items()}
    try:
        file = file_of(device)
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_suffix(".lock"), WAIT_FOR_OTHERS):  # not at any price: the file is whole also without
            merged = {**read_tilings(device, warn=False), **known}
            rows = [{"kernel": names[type(key)], "key": _plain(key), **_fields(one)} for key, one in merged.items()]
            data = {"format": FORMAT, "version": VERSION, "environment": environment_of(device), "tilings": rows}
            write_text(file, json.dumps(data, indent=1))
    except (OSError, RuntimeError) as e:  # there may be no home
        warnings.warn(f"tilings could not be kept in {file} ({e}); ALDS_FAST_CACHE names another folder", stacklevel=3)


def _plain(key: LaunchKey) -> dict[str, Any]:
    return {name: str(v).removeprefix("torch.") if name == "dtype" else v for name, v in key._asdict().items()}


def _fields(one: Measured) -> dict[str, Any]:
    tiling = None if one.tiling is None else one.tiling._asdict()
    return {"tiling": tiling, **{n: getattr(one, n) for n in ("us", "guess_us", "error")}}


def read_tilings(device: torch.device, warn: bool = True) -> dict[LaunchKey, Measured]:
    """What the device's file holds; what is no such file is warned about, and holds nothing."""
    if device.type != "cuda":
        return {}
    file: Path | str = "the cache"
    try:
        file = file_of(device)
        if not file.exists():
            return {}
        data = json.loads(file.read_text())
        if [data["format"], data["version"], data["environment"]] != [FORMAT, VERSION, environment_of(device)]:
            raise ValueError("it is of another environment")
        return dict(_parsed(row) for row in data["tilings"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:  # there may be no home
        if warn:
            warnings.warn(f"{file} is not a valid file of tilings ({e}): first guesses are taken", stacklevel=2)
        return {}


def _parsed(row: dict[str, Any]) -> tuple[LaunchKey, Measured]:
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in row["key"].items()}
    key = KERNELS[row["kernel"]](**{**fields, "dtype": getattr(torch, row["key"]["dtype"])})
    times = [row[name] for name in ("us", "guess_us", "error")]
    known = [t for i, t in enumerate(times) if i != 1 or t is not None]  # the second is that of the first guess
    if not all(isinstance(t, float) and 0 <= t < math.inf for t in known):
        raise ValueError(f"{times} are not microseconds and an error")
    return key, Measured(None if row["tiling"] is None else _checked(Tiling(**row["tiling"])), *times)


def _checked(tiling: Tiling) -> Tiling:
    if not all(type(n) is int and 1 <= n <= MAX_TILE and n & (n - 1) == 0 for n in tiling[:4]):
        raise ValueError(f"{tiling}: tiles and warps are powers of two from 1 to {MAX_TILE}")
    whole = type(tiling.num_stages) is int and type(tiling.parts) is int and type(tiling.by_rows) is bool
    if not whole or not 1 <= tiling.num_stages <= 8 or not 0 <= tiling.parts <= 16:
        raise ValueError(f"{tiling}: stages are from 1 to 8, parts from 0 to 16")
    return tiling
