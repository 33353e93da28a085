"""Measured ratios of low-rank to dense layers, kept on disk by hardware, torch version and number of threads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...files import cache_folder, write_text

FORMAT = "alds_fast.timings"
VERSION = 3  # to be raised when the low-rank layers run differently: what was measured before is then not read

STEADY = 0.2  # the largest spread of timings that are kept for other plans


class Timed(NamedTuple):
    """Latency over that of the dense layer: the median of the rounds, and the distance of their quartiles over it."""

    ratio: float
    spread: float

    @property
    def steady(self) -> bool:
        """Whether the rounds were near enough to one another to be trusted later."""
        return self.spread <= STEADY


Ratios = dict[tuple[int, int, str], dict[int, Timed]]  # (scheme, groups, pivots) to rank to what was measured


def device_name(device: torch.device) -> str:
    """The hardware behind a torch device, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((ln.split(":")[1].strip() for ln in lines if ln.startswith("model name")), platform.machine())
    return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """Everything outside a call that its time depends on: hardware, versions, threads and torch's settings."""
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    if device.type == "cuda":
        backend: Any = torch.backends.cudnn
        precision = torch.backends.cuda.matmul.fp32_precision, backend.conv.fp32_precision, backend.benchmark
    else:
        backend = torch.backends.mkldnn
        precision = backend.matmul.fp32_precision, backend.conv.fp32_precision, backend.enabled
    facts = {"device": device_name(device), "torch": torch.__version__, "threads": threads}
    return {**facts, "settings": list(precision)}


def _folder(cache: str | os.PathLike[str] | bool | None) -> Path | None:
    if cache is False:
        return None
    return Path(cache) if isinstance(cache, str | os.PathLike) else cache_folder()


class Timings:
    """What is known of every kind of layer call, by a text that describes it; read at once, written by :meth:`save`.

    ``cache`` is a folder, None for ``$ALDS_FAST_CACHE`` or ``~/.cache/alds_fast``, False for none. A file that is not
    what :meth:`save` writes, or a folder that cannot be written, is warned about and what is missing measured anew, as
    are timings of rounds that were far apart: of a busy hour.
    """

    def __init__(self, device: torch.device, cache: str | os.PathLike[str] | bool | None = None) -> None:
        self.environment = environment(device)
        identity = json.dumps([FORMAT, VERSION, self.environment], sort_keys=True)
        folder = _folder(cache)
        name = f"timings-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
        self.path = folder / name if folder else None
        self._calls = self._read()

    def of(self, call: str) -> Ratios:
        """The ratios known of a kind of call; add to it what is measured."""
        return self._calls.setdefault(call, {})

    def _read(self) -> dict[str, Ratios]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            data = json.loads(self.path.read_text())
            if [data["format"], data["version"], data["environment"]] != [FORMAT, VERSION, self.environment]:
                raise ValueError("it is of another environment")
            return {call: _ratios(rows) for call, rows in data["calls"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            warnings.warn(f"{self.path} is not a valid file of timings ({e}): measuring anew", stacklevel=2)
            return {}

    def save(self) -> None:
        """Write atomically, together with what other processes have written meanwhile."""
        if self.path is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with the file was said when it was first read
            written = self._read()
        for call, ratios in written.items():
            for curve, known in ratios.items():
                self.of(call)[curve] = known | self.of(call).get(curve, {})
        rows = {call: [[*curve, rank, *timed] for curve, known in ratios.items() for rank, timed in known.items()]
                for call, ratios in self._calls.items()}  # fmt: skip
        data = {"format": FORMAT, "version": VERSION, "environment": self.environment, "calls": rows}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(data))
        except OSError as e:
            warnings.warn(f"timings could not be kept in {self.path} ({e}); cache= names another folder", stacklevel=2)


def _ratios(rows: Any) -> Ratios:
    """Those that are to be trusted."""
    ratios: Ratios = {}
    for scheme, groups, pivots, rank, ratio, spread in rows:
        whole = all(type(n) is int and n >= 0 for n in (scheme, groups, rank))
        if not whole or not isinstance(ratio, float) or not 0 < ratio < math.inf:
            raise ValueError(f"{[scheme, groups, rank, ratio]} is not scheme, groups, rank and a ratio above 0")
        if not isinstance(spread, float) or not 0 <= spread < math.inf:
            raise ValueError(f"the spread {spread!r} is not a number of at least 0")
        if pivots not in ("", "output", "input"):
            raise ValueError(f"pivots are {pivots!r}")
        timed = Timed(ratio, spread)
        if timed.steady:
            ratios.setdefault((scheme, groups, pivots), {})[rank] = timed
    return ratios
