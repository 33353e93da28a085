"""Counters in device memory by which the programs of a launch find out which of them comes last.

A counter is 0 before a launch, and the launch leaves it at 0. Launches that may run at the same time must not share
counters: every stream has its own, and every launch that is captured into a CUDA graph gets some that nothing else ever
uses, as graphs captured on one stream may be replayed on others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_SLAB = 1 << 20  # counters a device keeps for captured launches: 4 MB, some 8,000 launches of rank 2048

_by_stream: dict[tuple[torch.device, int], Tensor] = {}
_for_graphs: dict[torch.device, Tensor] = {}  # what is left of the slab
_lock = threading.Lock()


def take_tickets(device: torch.device, count: int) -> Tensor:
    """``count`` int32 zeros on the device that no launch at work at the same time has."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _take_for_graph(device, count)
    if device not in _for_graphs:  # cannot be made during a capture
        _for_graphs[device] = torch.zeros(_SLAB, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)  # a capture on another stream may take them at once
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _by_stream or len(_by_stream[key]) < count:
        _by_stream[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return _by_stream[key]


def _take_for_graph(device: torch.device, count: int) -> Tensor:
    """Counters of the slab, or, where there is none or it is used up, some that each replay sets to 0 itself."""
    with _lock:
        free = _for_graphs.get(device)
        if free is None or len(free) < count:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _for_graphs[device] = free[-(-count // 4) * 4 :]  # addresses are multiples of 16, as without a graph
        return free[:count]


@contextmanager
def given_back(device: torch.device) -> Iterator[None]:
    """What graphs take meanwhile is free again after it: for graphs that never run at the same time as others."""
    before = _for_graphs.get(device)
    try:
        yield
    finally:
        if before is not None:
            _for_graphs[device] = before
