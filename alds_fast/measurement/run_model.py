"""What a model's layers are called with, and how long calls take when the sides take turns."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError

MAX_CALLS = 100_000  # in one sample


def _check_example(example_inputs: Any, name: str) -> None:
    named = isinstance(example_inputs, Mapping) and all(isinstance(name, str) for name in example_inputs)
    if not named and not isinstance(example_inputs, Tensor | tuple | list):
        raise ArgumentError(
            f"{name} is a {type(example_inputs).__name__}: expected a tensor, a tuple or list of positional arguments, "
            f"or a dict of keyword arguments"
        )


def call_model(model: nn.Module, example_inputs: Any, name: str = "example_inputs") -> Any:
    """``model(x)`` for a tensor, ``model(*x)`` for a tuple or list, ``model(**x)`` for a mapping of names.

    ArgumentError, which calls the inputs ``name``, for anything else. Run it inside :func:`inference`.
    """
    _check_example(example_inputs, name)
    if isinstance(example_inputs, Tensor):
        return model(example_inputs)
    return model(**example_inputs) if isinstance(example_inputs, Mapping) else model(*example_inputs)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients; every module's ``training`` flag is put back at the end.

    The flags are set directly, so that a ``train`` method of the model's own (one that merges weights, say) is not
    called.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """The model's buffers and torch's random state are put back at the end."""
    buffers = [b for b in model.buffers() if not b.is_meta and b.layout == torch.strided]
    saved = [(b, b._version, b.detach().clone()) for b in buffers if not b.is_inference()]
    with torch.random.fork_rng(sorted({b.device.index or 0 for b in model.parameters() if b.is_cuda})):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, version, old in saved:
                    if buffer._version != version:
                        buffer.copy_(old)


@contextmanager
def padded(*models: nn.Module) -> Iterator[None]:
    """Transformer encoders work on padded tensors, not on nested ones, whose rows are other tokens to each layer."""
    encoders = [m for model in models for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    flags = [(m, m.use_nested_tensor) for m in encoders]
    try:
        for encoder, _ in flags:
            encoder.use_nested_tensor = False
        yield
    finally:
        for encoder, flag in flags:
            encoder.use_nested_tensor = flag


Call = Callable[[], object]


def _captured(call: Call) -> Call:
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


def _all_captured(calls: Mapping[str, Call]) -> Mapping[str, Call]:
    """All calls as CUDA graphs, or all as they are where one of them cannot be captured."""
    try:
        return {name: _captured(call) for name, call in calls.items()}
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
    found: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad(), torch.cuda.device(device if cuda else -1):
        if cuda:
            calls = _all_captured(calls)
        counts = {name: _calls_per_sample(sample, call, min_ms) for name, call in calls.items()}
        for i in range(rounds):
            for name in list(calls) if i % 2 == 0 else reversed(list(calls)):
                found[name].append(sample(calls[name], counts[name]))
    return found


def median_ratio(times: Mapping[str, Sequence[float]], side: str, baseline: str) -> float:
    """Median over the rounds of side / baseline: each ratio is of neighbours in time, so drift cancels.

    >>> median_ratio({"a": [1.0, 2.0, 8.0], "b": [2.0, 4.0, 8.0]}, "a", "b")
    0.5
    """
    return statistics.median(a / b for a, b in zip(times[side], times[baseline], strict=True))
