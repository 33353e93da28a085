"""How calls are timed: CUDA graphs over rotating copies, sides taking turns, medians with quantiles.

On the CPU the same functions run the copies one after another and use the wall clock.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..measurement import Prepared, l2_bytes, prepare, sample_ms

QUANTILES = (0.2, 0.8)
SHORT = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def error_text(error: BaseException) -> str:
    """Type and the first lines of the message."""
    return f"{type(error).__name__}: {error}"[:600]


def synchronize(device: torch.device) -> None:
    """Wait for the device; raises what earlier work failed with."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give unused memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def poisoned(prepared: Prepared, device: torch.device) -> list[list[Tensor]]:
    """First and last outputs of a run before which they were filled with NaN (CUDA; on the CPU as they are)."""
    outputs = [list(o) if isinstance(o, list | tuple) else [o] for o in (prepared.outputs[0], prepared.outputs[-1])]
    if device.type == "cuda":
        for t in (t for ts in outputs for t in ts):
            t.fill_(math.nan)
        prepared.run()
        torch.cuda.synchronize(device)
    return outputs


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and quantiles."""
    low, high = (sorted(values)[round(q * (len(values) - 1))] for q in QUANTILES)
    return statistics.median(values), low, high


def _side(times: Sequence[float], firsts: Sequence[float]) -> dict[str, Any]:
    """What is told of a side: its times, and those of the first side over its own, of every round."""
    ms, low, high = summary(times)
    return {"ms": ms, "q20": low, "q80": high, "gain": summary([a / b for a, b in zip(firsts, times, strict=True)])}


def interleaved(
    sides: Mapping[str, Prepared], device: torch.device, rounds: int, min_ms: float
) -> dict[str, dict[str, Any]]:
    """Of every side milliseconds per call, "ms", "q20" and "q80", and "gain", how many times those of the first side.

    One sample a round of at least ``min_ms``, in alternating order; a gain is of the samples of one round, its median
    and quantiles.
    """
    counts = {}
    for name, side in sides.items():
        side.run()
        once = min(sample_ms(side.run, 1, device) for _ in range(2))
        counts[name] = max(1, min(1000, math.ceil(min_ms / max(once, 1e-4))))
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name in list(sides) if i % 2 == 0 else reversed(list(sides)):
            samples[name].append(sample_ms(sides[name].run, counts[name], device) / sides[name].copies)
    first, *_ = samples.values()
    return {name: _side(times[1:], first[1:]) for name, times in samples.items()}  # a round brings the clocks up


def ceilings(device: torch.device, quick: bool, dtype: torch.dtype = torch.bfloat16) -> dict[str, float | None]:
    """What the device does at best: bytes a second of a copy, operations a second, a launch in a CUDA graph."""
    count, n = (1 << 22, 256) if quick else (1 << 30, 8192) if device.type == "cuda" else (1 << 27, 2048)
    drawn = torch.Generator(device).manual_seed(0)
    source = torch.randint(0, 255, (count // 4,), dtype=torch.int32, device=device, generator=drawn)
    target = torch.empty_like(source)
    # a kernel that reads and writes: the copy engine that copy_ becomes in a graph took 1.5 times as long on an H200
    copy = prepare(lambda s: torch.add(s[0], 1, out=s[1]), [(source, target)], device)
    a, b = (torch.randn(n, n, device=device, dtype=dtype, generator=drawn) for _ in range(2))
    product = prepare(lambda s: s[0] @ s[1], [(a, b)], device)
    one = torch.zeros(1, device=device)
    launches = 100 if quick else 1000
    empty = prepare(lambda s: [s.add_(1.0) for _ in range(launches)][:1], [one], device)
    times = interleaved({"copy": copy, "product": product, "empty": empty}, device, 5 if quick else 15, 2.0)
    return {
        "copy_bytes_per_s": 2 * count / times["copy"]["ms"] * 1e3,
        f"{SHORT[dtype]}_flops_per_s": 2 * n**3 / times["product"]["ms"] * 1e3,
        "graph_launch_us": times["empty"]["ms"] / launches * 1e3 if device.type == "cuda" else None,
        "l2_bytes": l2_bytes(device),
    }
