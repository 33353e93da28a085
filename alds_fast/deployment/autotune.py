"""The ways to run a low-rank layer, timed against each other."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Container, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import (
    LOW_RANK,
    Int8LowRankLinear,
    LowRankLayer,
    LowRankLinear,
    MergedLinears,
    has_hooks,
    low_rank_like,
)
from ..measurement import (
    STEADY,
    InputSpec,
    call_model,
    copy_batch,
    device_of,
    inference,
    interleaved_ms,
    keeping_state,
    median_ratio,
    paired_ratios,
    quartile_spread,
    steady_ms,
)
from .equivalent_shapes import regroup, variants

TIE = 0.98  # a less simple candidate must take at most this share of the simpler one's time
MULTIPLE = {"cpu": 8, "cuda": 16}  # ranks that oneDNN's vectors and the tensor cores' tiles like
SEPARATE = "separate"
WRONG = 8.0  # times the error of two library calls, from which on a fused kernel is left out
TRIES = 3  # times that rounds of whole models are made at most
WHOLE = ("deployed", "two-op"), ("deployed", "dense"), ("two-op", "dense")
Specs = Mapping[InputSpec, int]
Modules = Mapping[str, Callable[[Tensor], Sequence[Tensor]]]


class Result(NamedTuple):
    """Milliseconds and errors by candidate, the winner, and a remark."""

    times_ms: dict[str, float]
    errors: dict[str, float]
    won: str
    note: str


def calls_key(layer: LowRankLayer, specs: Specs, plain: bool) -> str:
    """Everything that the time of a layer's calls depends on beside the hardware, as JSON."""
    factors = [[list(f.shape), list(f.stride()), str(f.dtype)] for f in (layer.encoder, layer.decoder)]
    inputs = [[spec.to_dict(), count] for spec, count in specs.items()]
    structure = with_backend(layer, "auto").extra_repr()
    fields = {"layer": [type(layer).__name__, structure], "factors": factors, "inputs": inputs, "plain": plain}
    return json.dumps(fields)


def with_backend(layer: LowRankLayer, backend: str) -> LowRankLayer:
    """The same layer, factors shared, that runs with that backend."""
    new = copy.copy(layer)
    new.backend = backend
    return new


def is_plain(layer: LowRankLayer, tied: Container[int]) -> bool:
    """Whether another module can take its place: no subclass, hooks, forward of its own or factors held elsewhere."""
    factors = (layer.encoder, layer.decoder)
    known = type(layer) in (*LOW_RANK.values(), Int8LowRankLinear) and "forward" not in vars(layer)
    return known and not has_hooks(layer) and not any(id(f) in tied for f in factors)


def candidates_of(layer: LowRankLayer, specs: Specs, plain: bool) -> tuple[dict[str, nn.Module], str]:
    """Ways to run the layer, the simplest first, and why the fused kernel is not among them ("" if it is).

    A layer that is not plain keeps its own form.
    """
    note = ""
    forms: dict[str, nn.Module] = {"dense": layer.to_dense()} if plain else {}
    kind = torch.device(next(iter(specs)).device).type
    others = variants(layer, MULTIPLE.get(kind, 8)) if plain else {}
    shapes = {"": layer} | {f", {text}": other for text, other in others.items()}
    for backend in ("two-op", "fused"):
        for text, shape in shapes.items():
            reasons = [shape.why_not_fused(spec.empty()) for spec in specs] if backend == "fused" else []
            note = note or _not_fused(reasons)
            if not any(reasons):
                forms[backend + text] = with_backend(shape, backend)
    return forms, note


def _not_fused(reasons: Sequence[str | None]) -> str:
    """The first of the reasons as a remark, "" without any."""
    return next((f"not fused: {reason}" for reason in reasons if reason), "")


def module_for(layer: LowRankLayer, won: str) -> nn.Module:
    """The module that runs the layer as that candidate does; ArgumentError for a shape that does not fit it.

    What was measured with the fused kernel runs as two calls where the kernel cannot run, with more rows for example.
    """
    if won == "dense":
        return layer.to_dense()
    backend, *sizes = won.split(", ")
    backend = "fused-first" if backend == "fused" else backend
    if not sizes:
        return with_backend(layer, backend)
    groups, rank = (int(text.partition("=")[2]) for text in sizes)
    return with_backend(regroup(layer, groups, rank), backend)


def _distance(output: Tensor, reference: Tensor) -> float:
    norm = float(reference.norm())
    return float((output.double() - reference).norm()) / norm if norm > 0 else float(output.double().norm())


def _larger(error: float, other: float) -> float:
    """The larger of two errors; NaN if one is."""
    return error if math.isnan(error) or other <= error else other


def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _fastest(
    sides: Modules, exact: Callable[[Tensor], Sequence[Tensor]], specs: Specs, rounds: int, note: str
) -> Result:
    """Time all sides over all inputs; the simplest, which come first, win ties.

    A kernel that fails, or is wrong, is left out.
    """
    times: dict[str, list[float]] = {name: [0.0] * rounds for name in sides}
    errors = dict.fromkeys(sides, 0.0)
    for spec, count in specs.items():
        x, calls = spec.make(), {}
        with torch.no_grad():
            off = torch.autocast(x.device.type, enabled=False)
            with off, torch.backends.cudnn.flags(enabled=True, benchmark=False):  # no search for the fastest in float64
                reference = exact(x.double() if x.is_floating_point() else x)
            for name in list(times):
                try:
                    calls[name] = spec.caller(sides[name], x)
                    outputs = calls[name]()
                except Exception as e:
                    if not name.startswith("fused"):
                        raise
                    note = f"{name} failed: {type(e).__name__}: {e}"
                    del times[name], errors[name], calls[name]
                    continue
                for output, y in zip(outputs, reference, strict=True):
                    errors[name] = _larger(errors[name], _distance(output, y))
        for name, ms in interleaved_ms(calls, spec.device, rounds=rounds).items():
            times[name] = [total + count * one for total, one in zip(times[name], ms, strict=True)]
    plain = max(errors.get("two-op", errors[next(iter(errors))]), max(_rounding(spec.dtype) for spec in specs))
    for name in [n for n in times if n.startswith("fused") and not errors[n] <= WRONG * plain]:
        note = f"{name} is wrong: its error is {errors[name]:.2g}, that of two calls {plain:.2g}"
        del times[name]
    first = won = next(iter(times))
    typical = {name: median(times[first]) * median_ratio(times, name, first) for name in times}  # drift cancels
    for name in typical:
        if typical[name] < TIE * typical[won]:
            won = name
    return Result(typical, errors, won, note)


def autotune_layer(layer: LowRankLayer, specs: Specs, rounds: int, plain: bool) -> Result:
    """All ways to run one layer, on random inputs like those that it gets."""
    made, note = candidates_of(layer, specs, plain)
    exact = double(layer)
    sides = {name: lambda x, m=module: (m(x),) for name, module in made.items()}
    return _fastest(sides, lambda x: (exact(x),), specs, rounds, note)


def autotune_merged(layers: Sequence[LowRankLinear], won: Sequence[str], specs: Specs, rounds: int) -> Result:
    """Layers that read the same input, each as it won, against one encoder call for all of them."""
    alone = [module_for(layer, name) for layer, name in zip(layers, won, strict=True)]
    exact = [double(layer) for layer in layers]
    sides: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {SEPARATE: lambda x: [m(x) for m in alone]}
    sides["two-op"] = MergedLinears(layers, "two-op")
    fused = MergedLinears(layers, "fused")
    reasons = [fused.why_not_fused(spec.empty()) for spec in specs]
    if not any(reasons):
        sides["fused"] = fused
    return _fastest(sides, lambda x: [m(x) for m in exact], specs, rounds, _not_fused(reasons))


def double(layer: LowRankLayer) -> LowRankLayer:
    """A float64 copy without hooks that runs as two calls."""
    new = low_rank_like(layer.dense_module(), layer.decomposition)
    for name in ("encoder", "decoder", "bias"):
        old = getattr(layer, name)
        setattr(new, name, None if old is None else nn.Parameter(old.detach().double(), False))
    if layer.pivots:
        new.order = layer.order
    new.backend = "two-op"
    return new


def whole_model_ms(sides: Mapping[str, nn.Module], example_inputs: Any, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of whole models, which take turns with copies of the example; random state is put back after.

    Of more rounds where ratios to the first side are far apart, ``TRIES`` times as many at most.
    """
    first = next(iter(sides))
    device = device_of(sides[first])

    def call(model: nn.Module) -> Callable[[], object]:
        def run() -> object:
            with inference(model):
                return call_model(model, example_inputs)

        return run

    example_inputs = copy_batch(example_inputs)
    calls = {name: call(model) for name, model in sides.items()}
    with keeping_state(sides[first]):
        return steady_ms(calls, device, first, rounds=rounds, repeats=TRIES, steady=STEADY)


def best_model(times: Mapping[str, Sequence[float]]) -> str:
    """The deployed model, unless two calls everywhere are more than 2 % faster or the dense model is not slower."""
    best = "deployed" if median_ratio(times, "two-op", "deployed") >= TIE else "two-op"
    return "dense" if median_ratio(times, best, "dense") >= 1 else best


def model_ratios(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """What decides between the whole models: by "deployed / two-op" and the like, medians of paired ratios."""
    return {f"{a} / {b}": median_ratio(times, a, b) for a, b in WHOLE}


def model_spreads(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """How far the quartiles of these ratios are apart, over the median."""
    return {f"{a} / {b}": quartile_spread(paired_ratios(times, a, b)) for a, b in WHOLE}
