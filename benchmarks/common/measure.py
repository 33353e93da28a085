"""Seconds of sides that take turns, and the memory of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path


def take_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Median wall and CPU seconds of every side over ``rounds`` rounds, one call of each per round."""
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            begin, used = time.perf_counter(), time.process_time()
            call()
            wall[name].append(time.perf_counter() - begin)
            cpu[name].append(time.process_time() - used)
    return {n: {"wall_s": statistics.median(wall[n]), "cpu_s": statistics.median(cpu[n])} for n in sides}


def peak_mb(call: Callable[[], object]) -> float:
    """Growth of this process' peak resident set over the call, in MB (Linux: the kernel's counter, reset before)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / 1e3


def _resident(field: str) -> float:
    """A field of /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(ln.split()[1] for ln in lines if ln.startswith(field)))
