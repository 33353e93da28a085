"""Calls over rotating copies of their arguments, so that none finds its weights in a cache: on CUDA as one graph.

On the CPU the copies run one after another, and are not rotated past the caches.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

MAX_COPIES = 512


class Prepared(NamedTuple):
    """``run`` calls once with each of ``copies`` argument sets; ``outputs`` are what these calls return."""

    run: Callable[[], object]
    outputs: list[Any]
    copies: int


def l2_bytes(device: torch.device) -> int:
    """Size of the device's second-level cache; 0 for the CPU, which is not rotated past its caches."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def copies_for(bytes_per_set: int, device: torch.device) -> int:
    """So many sets that together they exceed twice the second-level cache; at least two."""
    return min(MAX_COPIES, max(2, 2 * l2_bytes(device) // max(1, bytes_per_set) + 1))


def prepare(call: Callable[[Any], Any], sets: Sequence[Any], device: torch.device) -> Prepared:
    """The calls with every set of arguments: on CUDA one graph, with all its outputs apart from each other."""
    if device.type != "cuda":
        outputs = [call(s) for s in sets]
        return Prepared(lambda: [call(s) for s in sets], outputs, len(sets))
    call(sets[0])  # compiles, and chooses algorithms
    torch.cuda.synchronize(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for s in sets[:3]:
            call(s)
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    gc.disable()  # nothing may be freed by chance during the capture
    try:
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            outputs = [call(s) for s in sets]
    except BaseException:
        torch.cuda.set_stream(torch.cuda.default_stream(device))  # a capture that fails may leave its own behind
        raise
    finally:
        if collecting:
            gc.enable()
    graph.replay()
    torch.cuda.synchronize(device)
    return Prepared(graph.replay, outputs, len(sets))
