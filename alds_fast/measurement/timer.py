"""How long calls take when the sides take turns."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch

from ..errors import ArgumentError

MAX_CALLS = 100_000  # in one sample
Call = Callable[[], object]


def _capture(call: Call) -> Call:
    """The call as a CUDA graph; raises what the capture raises."""
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the first calls may allocate and choose algorithms, which a capture must not
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails leaves its own stream
    return graph.replay


def _capture_all(calls: Mapping[str, Call]) -> Mapping[str, Call]:
    """All calls as CUDA graphs, or all as they are where one of them cannot be captured."""
    try:
        return {name: _capture(call) for name, call in calls.items()}
    except Exception as e:  # whatever a call does that a capture forbids
        torch.cuda.synchronize()
        warnings.warn(f"a CUDA graph could not be captured ({e}): all sides are timed eagerly", stacklevel=3)
        return calls


def _cpu_ms(call: Call, count: int) -> float:
    """Milliseconds per call over ``count`` calls, by the wall clock."""
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) * 1e3 / count


def _cuda_ms(call: Call, count: int) -> float:
    """Milliseconds per call over ``count`` calls, by CUDA events on the current stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count


def _calls_per_sample(sample: Callable[[Call, int], float], call: Call, min_ms: float) -> int:
    """So many calls that they last ``min_ms``; the first call of all warms up."""
    sample(call, 1)
    once = min(sample(call, 1), sample(call, 1))
    return max(1, min(MAX_CALLS, math.ceil(min_ms / max(once, 1e-6))))


def interleaved_ms(
    calls: Mapping[str, Call], device: torch.device | str, *, rounds: int = 7, min_ms: float = 2.0
) -> dict[str, list[float]]:
    """Milliseconds per call of every side, one number per round, without gradients.

    The sides take turns within a round, in reverse order every other round, so that drift of the machine hits all of
    them; a sample repeats its call until it lasts at least ``min_ms`` (calibrated once, warm). On CUDA all sides run
    as CUDA graphs, or, where one cannot be captured, all eagerly, and are timed by events.
    """
    if rounds < 1 or not min_ms > 0:
        raise ArgumentError(f"rounds={rounds!r}, min_ms={min_ms!r}: expected at least 1 and more than 0")
    device = torch.device(device)
    cuda = device.type == "cuda"
    sample = _cuda_ms if cuda else _cpu_ms
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad(), torch.cuda.device(device if cuda else -1):
        if cuda:
            calls = _capture_all(calls)
        counts = {name: _calls_per_sample(sample, call, min_ms) for name, call in calls.items()}
        for i in range(rounds):
            for name in list(calls) if i % 2 == 0 else reversed(list(calls)):
                times[name].append(sample(calls[name], counts[name]))
    return times


def paired_ratios(times: Mapping[str, Sequence[float]], side: str, baseline: str) -> list[float]:
    """side / baseline of every round."""
    return [a / b for a, b in zip(times[side], times[baseline], strict=True)]


def median_ratio(times: Mapping[str, Sequence[float]], side: str, baseline: str) -> float:
    """Median over the rounds of side / baseline: each ratio is of neighbours in time, so drift cancels.

    >>> median_ratio({"a": [1.0, 2.0, 8.0], "b": [2.0, 4.0, 8.0]}, "a", "b")
    0.5
    """
    return statistics.median(paired_ratios(times, side, baseline))


def quartile_spread(ratios: Sequence[float]) -> float:
    """The distance of the quartiles over the median; 0 for one number.

    >>> quartile_spread([1.0, 1.0, 1.5, 0.5, 8.0])
    0.5
    """
    if len(ratios) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return (high - low) / middle
