"""How long calls take when the sides take turns, and layers inside of runs."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...errors import ArgumentError
from ..inputs import InputSpec, _first_tensor

MAX_CALLS = 100_000  # in one sample
Call = Callable[[], object]
Parts = dict[tuple[str, InputSpec], float]  # by name of a module and what it is called with


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
        with torch.cuda.graph(graph, stream=side):  # torch's own is on the device of the first capture
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


def sample_ms(call: Call, count: int, device: torch.device) -> float:
    """Milliseconds per call over ``count`` calls: by events on CUDA, by the wall clock elsewhere."""
    return (_cuda_ms if device.type == "cuda" else _cpu_ms)(call, count)


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


def steady_ms(
    calls: Mapping[str, Call],
    device: torch.device | str,
    baseline: str,
    *,
    rounds: int = 7,
    repeats: int,
    steady: float,
) -> dict[str, list[float]]:
    """As :func:`interleaved_ms`, of more rounds where those of a side over the baseline's are far apart.

    ``repeats`` times as many at most, until the quartiles of these ratios are within ``steady`` of their median.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, ms in interleaved_ms(calls, device, rounds=rounds).items():
            times[name] += ms
        if all(quartile_spread(paired_ratios(times, name, baseline)) <= steady for name in calls):
            break
    return times


def _runs_by_part(run: Call, modules: Mapping[str, nn.Module], rounds: int) -> list[tuple[float, Parts]]:
    """Milliseconds of runs on the CPU, each with those inside of calls of the modules; one run before warms up."""
    begins: dict[str, tuple[InputSpec, float]] = {}
    inside: Parts = {}

    def before(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = _first_tensor(args, kwargs)
        if x is not None:
            begins[name] = InputSpec.of(x), time.perf_counter()

    def after(name: str) -> None:
        end = time.perf_counter()
        if name in begins:
            spec, begin = begins.pop(name)
            inside[name, spec] = inside.get((name, spec), 0.0) + 1e3 * (end - begin)

    handles, runs = [], list[tuple[float, Parts]]()
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(lambda _, a, k, n=name: before(n, a, k), with_kwargs=True))
        handles.append(module.register_forward_hook(lambda *_, n=name: after(n)))
    try:
        with torch.no_grad():
            run()
            for _ in range(rounds):
                inside.clear()
                runs.append((_cpu_ms(run, 1), dict(inside)))
    finally:
        for handle in handles:
            handle.remove()
    return runs


def ms_by_part(
    run: Call, modules: Mapping[str, nn.Module], *, rounds: int, repeats: int, steady: float
) -> tuple[float, Parts]:
    """Milliseconds of a run of a model on the CPU, and of these inside calls of its modules, by name and input.

    Medians over runs, of shares of the same run: caches are as the model leaves them, and what interrupts a run hits
    all of its parts by their length. ``rounds`` runs, up to ``repeats`` times as many until the quartiles of the share
    inside of all modules are within ``steady`` of it.
    """
    runs = list[tuple[float, Parts]]()
    for _ in range(repeats):
        runs += _runs_by_part(run, modules, rounds)
        inside = [sum(parts.values()) / whole for whole, parts in runs]
        if quartile_spread(inside) <= steady:
            break
    keys = dict.fromkeys(key for _, parts in runs for key in parts)
    shares = {key: statistics.median(parts.get(key, 0.0) / whole for whole, parts in runs) for key in keys}
    whole = statistics.median(whole for whole, _ in runs)
    scale = whole * statistics.median(inside) / (sum(shares.values()) or 1.0)  # medians of parts are not those of sums
    return whole, {key: scale * share for key, share in shares.items()}


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
    """The distance of the quartiles over the median; 0 for one number, and where all are 0.

    >>> quartile_spread([1.0, 1.0, 1.5, 0.5, 8.0])
    0.5
    """
    if len(ratios) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    if high == low:
        return 0.0
    return (high - low) / middle if middle else math.inf
