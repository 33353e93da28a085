"""The most memory that a run of a model takes at once, beside its weights and inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from ...errors import ArgumentError
from ..private_runs import copy_batch, keeping_state
from ..run_model import call_model, device_of, inference

_LOG_LEVEL = "KINETO_LOG_LEVEL"  # of the library behind torch's profiler
_MARK = "alds_fast layer "


class Peak(NamedTuple):
    """Bytes that a run holds at most beyond what was held when it began, and by name those during calls of layers."""

    whole: int
    of_layers: dict[str, int]


def peak_of_activations(model: nn.Module, example_inputs: Any, names: Iterable[str] = ()) -> Peak:
    """The peak of one run without gradients, and of the calls of the named layers in it.

    Activations, outputs, and what operators take for themselves meanwhile: all that torch's allocator gives out on the
    model's device. Weights and inputs are not counted, as they are there before. On CUDA a first run, which is not
    measured, compiles kernels and takes the libraries' workspaces. The model is left as it was. Raises ArgumentError
    on the CPU inside of a running torch profiler, which is what measures there.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> peak_of_activations(model, torch.zeros(10, 8), ["2"])
    Peak(whole=2560, of_layers={'2': 1600})
    """
    device = device_of(model)
    modules = {name: model.get_submodule(name) for name in names}
    with inference(model), keeping_state(model):
        run = partial(call_model, model, copy_batch(example_inputs))
        return _cuda_peak(run, modules, device) if device.type == "cuda" else _cpu_peak(run, modules)


def _teller(told: Callable[[str], object], name: str) -> Callable[..., None]:
    """A hook that changes nothing."""

    def hook(*of_call: Any) -> None:
        told(name)

    return hook


@contextmanager
def _around(
    modules: dict[str, nn.Module], begin: Callable[[str], object], end: Callable[[str], object]
) -> Iterator[None]:
    """These are told of calls of the modules, by name."""
    handles = [m.register_forward_pre_hook(_teller(begin, name)) for name, m in modules.items()]
    handles += [m.register_forward_hook(_teller(end, name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cuda_peak(run: Callable[[], object], modules: dict[str, nn.Module], device: torch.device) -> Peak:
    run()
    before, whole, of_layers = torch.cuda.memory_allocated(device), 0, dict.fromkeys(modules, 0)

    def next_part(name: str | None = None) -> None:
        nonlocal whole
        held = torch.cuda.max_memory_allocated(device) - before
        whole = max(whole, held)
        if name is not None:
            of_layers[name] = max(of_layers[name], held)
        torch.cuda.reset_peak_memory_stats(device)

    torch.cuda.reset_peak_memory_stats(device)
    with _around(modules, lambda _: next_part(), next_part):
        run()
    next_part()
    return Peak(whole, of_layers)


def _cpu_peak(run: Callable[[], object], modules: dict[str, nn.Module]) -> Peak:
    from torch.autograd.profiler import profile, record_function

    if torch.autograd._profiler_enabled():
        raise ArgumentError(
            "memory= with example_inputs= measures with torch's profiler, which is running already: plan outside of it"
        )
    marks = {name: record_function(_MARK + name) for name in modules}
    with (
        _around(modules, lambda name: marks[name].__enter__(), lambda name: marks[name].__exit__(None, None, None)),
        _untold(),
        profile(use_kineto=True, profile_memory=True) as profiled,
    ):
        run()
    return _of_events(profiled.kineto_results.events(), modules)


def _of_events(events: Iterable[Any], names: Iterable[str]) -> Peak:
    """The peaks, of the profiler's events: what was given out and taken back, and the calls of layers."""
    steps: list[tuple[int, str, int]] = []
    for event in events:
        name = event.name()
        if name == "[memory]":
            steps.append((event.start_ns(), "", event.nbytes()))
        elif name.startswith(_MARK):
            steps += [(event.start_ns(), name, 1), (event.end_ns(), name, -1)]
    held, whole, of_layers, inside = 0, 0, dict.fromkeys(names, 0), set[str]()
    for _, mark, change in sorted(steps, key=itemgetter(0)):
        if not mark:
            held += change
        else:
            (inside.add if change > 0 else inside.discard)(mark.removeprefix(_MARK))
        whole = max(whole, held)
        of_layers |= {name: max(of_layers[name], held) for name in inside}
    return Peak(whole, of_layers)


@contextmanager
def _untold() -> Iterator[None]:
    """The profiler says nothing on standard error, where it is used for the first time."""
    before = os.environ.get(_LOG_LEVEL)
    os.environ.setdefault(_LOG_LEVEL, "99")
    try:
        yield
    finally:
        if before is None:
            del os.environ[_LOG_LEVEL]
