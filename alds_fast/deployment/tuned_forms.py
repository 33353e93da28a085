"""Tilings for the fused kernels of a model's low-rank layers, in all forms that deploy tries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..checks import check_model
from ..errors import ArgumentError
from ..kernels import why_not_fused_linears
from ..layers import LowRankLayer, MergedLinears, tied_names
from ..measurement import device_of, layer_inputs
from ..progress import ProgressOption, telling
from ..text import ShownInNotebooks, table
from ..tuning import FusedCall, Gpu, TunedRow, tune_calls
from .autotune import Specs, calls_key, candidates_of, double, is_plain, with_backend
from .layer_rows import Case, Members, merge_groups

Outputs = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class TuningTable(ShownInNotebooks):
    """What :func:`tune` found: one row per launch for which nothing was known."""

    rows: tuple[TunedRow, ...]

    def __str__(self) -> str:
        if not self.rows:
            return "nothing to tune: every launch of the fused kernels is known on this device"
        headers = ["layer", "launch", "first guess us", "tuned us", "speed-up", "tiling", "timed", "left out"]
        return table(headers, [_cells(row) for row in self.rows], left=(0, 1, 5))


def _cells(row: TunedRow) -> list[str]:
    found, kind = row.found, type(row.key).__name__.removesuffix("Key").lower()
    sizes = {} if found.tiling is None else found.tiling._asdict()
    tiling = " ".join(f"{name}={size}" for name, size in sizes.items() if size) or "as guessed"
    times = "-", f"{found.us:.1f}", "-"
    if found.guess_us is not None:
        times = f"{found.guess_us:.1f}", f"{found.us:.1f}", f"{found.guess_us / found.us:.2f}"
    return [row.name, kind, *times, tiling, str(row.timed), str(len(row.faults))]


def _form(layer: LowRankLayer, specs: Specs, plain: bool, name: str) -> nn.Module:
    return candidates_of(layer, specs, plain)[0][name]


def _sides(layers: Sequence[LowRankLayer]) -> tuple[Outputs, Outputs]:
    """What the layers give as library calls, and exactly: made at every call, as a copy of a model takes memory."""
    return (
        lambda x: [with_backend(layer, "two-op")(x) for layer in layers],
        lambda x: [double(layer)(x) for layer in layers],
    )


def fused_calls(layers: Mapping[str, LowRankLayer], groups: Members, cases: Mapping[str, Case]) -> list[FusedCall]:
    """Every call that deploy may time with the fused kernel: layers and their equivalent shapes, and merged ones."""
    calls, seen = list[FusedCall](), set[str]()
    for name, layer in layers.items():
        specs, plain = cases[name]
        key = calls_key(layer, specs, plain)
        if not specs or key in seen:
            continue
        seen.add(key)
        for form in candidates_of(layer, specs, plain)[0]:
            if form.startswith("fused"):
                make: Callable[[], nn.Module] = partial(_form, layer, specs, plain, form)
                told = f"{name}{form.removeprefix('fused')}"
                calls += [FusedCall(told, make, spec, *_sides([layer])) for spec in specs]
    for names, members in groups.items():
        make = partial(MergedLinears, members, "fused")
        for spec in cases[names[0]][0]:
            if why_not_fused_linears(spec.empty(), len(members)) is None:
                calls.append(FusedCall(" + ".join(names), make, spec, *_sides(members)))
    return calls


def tune(model: nn.Module, example_inputs: Any, *, progress: ProgressOption = None) -> TuningTable:
    """Find the fastest tilings of the fused kernels for a compressed model on its GPU, and keep them on disk.

    A GPU's best tile sizes depend on the layer. For every launch of a low-rank layer, with the inputs that it gets from
    the example, some ten tilings that a model of the device thinks fast are compiled (in processes of their own),
    verified twice against float64, with twice the error of two library calls allowed, and timed in CUDA graphs with
    cold caches; half of them go after the first sample, all but three after five. What is found holds for this device,
    version of Triton and of this library's kernels, and is taken by every later launch, in later processes too.
    :func:`alds_fast.deploy` calls this first, unless ``tune=False``.

    Args:
        model: a model with low-rank layers, on a CUDA device, in the type that it will run with.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments of the model.
        progress: of compiling and timing, as of :func:`alds_fast.analyze`.

    Returns:
        A :class:`TuningTable` of the launches that were tuned; those known before are not tuned again.

    Raises:
        UserWarning: a layer is not tuned, as it fails, is wrong or does not fit into memory. ArgumentError: the model
        is not on a CUDA device, or a CUDA graph is being captured. ModelError: the example does not run.
    """
    check_model(model)
    device = device_of(model)
    if device.type != "cuda":
        raise ArgumentError(f"tune needs a model on a CUDA device, this one is on {device}: move it there with .cuda()")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LowRankLayer)}
    inputs, tied = layer_inputs(model, example_inputs, layers), tied_names(model)
    cases = {name: (inputs[name], is_plain(layer, tied)) for name, layer in layers.items()}
    groups = merge_groups(model, example_inputs, layers, cases)
    with telling(progress) as told:
        return TuningTable(tuple(tune_calls(fused_calls(layers, groups, cases), Gpu(device), told)))
