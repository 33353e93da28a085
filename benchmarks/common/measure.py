"""Seconds of sides that take turns, and the memory of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path


def in_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of every side, round by round: one call of each per round."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            begin, used = time.perf_counter(), time.process_time()
            call()
            seconds[name].append((time.perf_counter() - begin, time.process_time() - used))
    return seconds


def take_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Median wall and CPU seconds of every side over ``rounds`` rounds."""
    medians = {}
    for name, pairs in in_turns(sides, rounds).items():
        wall, cpu = zip(*pairs, strict=True)
        medians[name] = {"wall_s": statistics.median(wall), "cpu_s": statistics.median(cpu)}
    return medians


def peak_mb(call: Callable[[], object]) -> float:
    """Growth of this process' peak resident set over the call, in MB (Linux: the kernel's counter, reset before)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mb("VmRSS")
    call()
    return resident_mb("VmHWM") - before


def resident_mb(field: str) -> float:
    """This process' resident set, "VmRSS" or at its peak "VmHWM" (ru_maxrss may be that of the process that forked)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1e3
