"""Deploy a compressed model: measure every low-rank layer on the device and keep the fastest way to run it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .deploy_table import DeployRow, DeployTable
from .discover import label
from .errors import ArgumentError, BackendError, ModelError
from .layers import LowRankLayer
from .measure import InputSpec, call_model, inference, interleaved_ms, layer_inputs, median_ratio
from .replace import replace_layers
from .timings import environment
from .variants import regrouped, variants

BACKENDS = ("dense", "two-op", "fused")
TIE = 0.98  # a less simple candidate must take at most this share of the simpler one's time
MULTIPLE = {"cpu": 8, "cuda": 16}  # ranks that oneDNN's vectors and the tensor cores' tiles like
Specs = Mapping[InputSpec, int]


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _call_text(layer: LowRankLayer, specs: Specs) -> str:
    factors = [[list(f.shape), list(f.stride()), str(f.dtype)] for f in (layer.encoder, layer.decoder)]
    inputs = [[spec.to_dict(), count] for spec, count in specs.items()]
    return json.dumps({"layer": str(layer), "factors": factors, "inputs": inputs})


def _with_backend(layer: LowRankLayer, backend: str) -> LowRankLayer:
    new = copy.deepcopy(layer)
    new.backend = backend
    return new


def _has_hooks(module: nn.Module) -> bool:
    return any(name.endswith("hooks") and len(v) for name, v in vars(module).items() if isinstance(v, dict))


def candidates_of(layer: LowRankLayer, specs: Specs) -> tuple[dict[str, Callable[[], nn.Module]], str]:
    """Ways to run the layer, the simplest first, and why the fused kernel is not among them ("" if it is)."""
    found: dict[str, Callable[[], nn.Module]] = {"dense": layer.to_dense} if not _has_hooks(layer) else {}
    device = next(iter(specs)).device
    others = variants(layer, MULTIPLE.get(torch.device(device).type, 8)) if not _has_hooks(layer) else {}
    shapes = {"": layer} | {f", {text}": other for text, other in others.items()}
    note = ""
    for backend in BACKENDS[1:]:
        for text, shape in shapes.items():
            reasons = [shape.why_not_fused(spec.make()) for spec in specs] if backend == "fused" else []
            note = note or next((r for r in reasons if r), "")
            if not any(reasons):
                found[backend + text] = partial(_with_backend, shape, backend)
    return found, note


def _distance(found: Tensor, reference: Tensor) -> float:
    norm = float(reference.norm())
    return float((found.double() - reference).norm()) / norm if norm > 0 else float(found.double().norm())


def _measure(layer: LowRankLayer, specs: Specs, rounds: int) -> tuple[dict[str, float], dict[str, float], str, str]:
    """Milliseconds and errors by candidate, the winner, and why fused is not among them."""
    made, note = candidates_of(layer, specs)
    modules = {name: make() for name, make in made.items()}
    times: dict[str, list[float]] = {name: [0.0] * rounds for name in modules}
    errors = dict.fromkeys(modules, 0.0)
    exact = _with_backend(layer, "two-op").double()
    for spec, count in specs.items():
        x = spec.make()
        with torch.no_grad():
            reference = exact(x.double())
            for name, module in modules.items():
                errors[name] = max(errors[name], _distance(module(x), reference))
        for name, ms in interleaved_ms(
            {n: partial(m, x) for n, m in modules.items()}, spec.device, rounds=rounds
        ).items():
            times[name] = [total + count * one for total, one in zip(times[name], ms, strict=True)]
    won = next(iter(times))
    for name in times:  # simplest first
        if median_ratio(times, name, won) < TIE:
            won = name
    return {name: median(ms) for name, ms in times.items()}, errors, won, note


def _head(name: str, layer: LowRankLayer) -> tuple[str, str, tuple[int, ...], str]:
    """The first fields of a row."""
    structure = f"scheme={layer.scheme}, groups={layer.groups}, rank={layer.rank}"
    return name, type(layer).__name__, layer.weight_shape.weight, structure


def _row(name: str, layer: LowRankLayer, specs: Specs, known: Mapping[str, DeployRow], rounds: int) -> DeployRow:
    head = _head(name, layer)
    if not specs:
        return DeployRow(*head, "", {}, {}, "two-op", "not called with the example inputs", "forced")
    call = _call_text(layer, specs)
    if call in known:
        return replace(known[call], name=name)
    return DeployRow(*head, call, *_measure(layer, specs, rounds), "measured")


def _rows(
    layers: Mapping[str, LowRankLayer], inputs: Mapping[str, Specs], known: dict[str, DeployRow], rounds: int
) -> list[DeployRow]:
    """A row for every layer; layers with the same call are measured once."""
    rows = []
    for name, layer in layers.items():
        rows.append(_row(name, layer, inputs[name], known, rounds))
        if rows[-1].call:
            known[rows[-1].call] = rows[-1]
    return rows


def _forced(name: str, layer: LowRankLayer, specs: Specs, backend: str) -> DeployRow:
    if backend == "fused":
        for spec in specs:
            if reason := layer.why_not_fused(spec.make()):
                raise BackendError(f"layer {label(name)}: backend='fused' cannot run it: {reason}")
    return DeployRow(*_head(name, layer), _call_text(layer, specs), {}, {}, backend, "", "forced")


def _module_for(layer: LowRankLayer, won: str) -> nn.Module:
    """The module that runs the layer as the candidate of that name does."""
    if won == "dense":
        return layer.to_dense()
    backend, *sizes = won.split(", ")
    if not sizes:
        return _with_backend(layer, backend)
    groups, rank = (int(text.partition("=")[2]) for text in sizes)
    return _with_backend(regrouped(layer, groups, rank), backend)


def _built(model: nn.Module, layers: Mapping[str, LowRankLayer], won: Mapping[str, str]) -> nn.Module:
    new = {name: _module_for(layer, won[name]) for name, layer in layers.items()}
    return replace_layers(model, new)


def _whole_model_ms(sides: Mapping[str, nn.Module], example_inputs: Any, rounds: int) -> dict[str, list[float]]:
    device = _device(next(iter(sides.values())))

    def call(model: nn.Module) -> Callable[[], object]:
        def run() -> object:
            with inference(model):
                return call_model(model, example_inputs)

        return run

    return interleaved_ms({name: call(model) for name, model in sides.items()}, device, rounds=rounds)


def _known(table: DeployTable | str | os.PathLike[str] | None, device: torch.device) -> dict[str, DeployRow]:
    if table is None:
        return {}
    if isinstance(table, str | os.PathLike):
        table = DeployTable.load(table)
    if not isinstance(table, DeployTable):
        raise ArgumentError(f"table is a {type(table).__name__}: expected a DeployTable or the path of a saved one")
    return {call: replace(row, source="table") for call, row in table.known(environment(device)).items()}


def deploy(
    model: nn.Module,
    example_inputs: Any,
    *,
    backend: str | None = None,
    table: DeployTable | str | os.PathLike[str] | None = None,
    rounds: int = 7,
    report: bool = False,
) -> Any:
    """A copy of a compressed model in which every low-rank layer runs in the way that was measured to be fastest.

    For every layer, with the inputs that it gets from the example, taking turns: the recomposed dense layer, the two
    library calls, and the fused kernel where it can run; the latter two also with the same function in other shapes
    (fewer slices with a block-diagonal encoder, ranks padded with zeros to a multiple of 8 on the CPU, 16 on a GPU).
    The fastest is kept; one that is less than 2 % faster than a simpler one is not. At last the whole deployed model
    is timed against the dense one, and where it is not faster the dense one is returned. ``model`` is not changed.

    Args:
        model: a model with low-rank layers, on the device and in the type that it will run with.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments of the model.
        backend: None measures; "dense", "two-op" or "fused" force one on every layer that is called.
        table: a :class:`DeployTable` of an earlier call, or the path of a saved one: what it holds for this hardware,
            torch version and thread count is not measured again.
        rounds: turns that every side takes.
        report: also return the :class:`DeployTable`.

    Returns:
        The deployed module, or (module, table). The table is also the module's ``alds_deployed``.

    Raises:
        ArgumentError: an argument is out of range. ModelError: the example does not run, or nothing can be copied.
        BackendError: backend="fused" where the kernel cannot run a layer. FileFormatError: the table is not one.

    >>> import alds_fast as alds
    >>> small = alds.compress(torch.nn.Sequential(torch.nn.Linear(256, 256)), params=0.25)
    >>> fast, found = deploy(small, torch.randn(64, 256), rounds=3, report=True)
    >>> sorted(found.model_ms), found.rows[0].won in found.rows[0].times_ms
    (['dense', 'deployed', 'two-op'], True)
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is a {type(model).__name__}; pass the torch.nn.Module itself")
    if backend is not None and backend not in BACKENDS:
        raise ArgumentError(f"backend={backend!r} is not None or one of {', '.join(BACKENDS)}")
    if not isinstance(rounds, int) or rounds < 1:
        raise ArgumentError(f"rounds={rounds!r} is not an integer >= 1")
    known = _known(table, _device(model))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LowRankLayer)}
    inputs = layer_inputs(model, example_inputs, layers)
    if backend is not None:
        rows = [_forced(name, layer, inputs[name], backend) for name, layer in layers.items()]
    else:
        rows = _rows(layers, inputs, known, rounds)
    sides = {
        "dense": _built(model, layers, dict.fromkeys(layers, "dense")),
        "two-op": _built(model, layers, dict.fromkeys(layers, "two-op")),
        "deployed": _built(model, layers, {row.name: row.won for row in rows}),
    }
    times = _whole_model_ms(sides, example_inputs, rounds)
    slower = backend is None and median_ratio(times, "deployed", "dense") >= 1
    medians = {name: median(ms) for name, ms in times.items()}
    kept = "dense" if slower and any(row.won != "dense" for row in rows) else "deployed"
    found = DeployTable(tuple(rows), environment(_device(model)), medians, kept)
    result = sides[kept]
    object.__setattr__(result, "alds_deployed", found)
    return (result, found) if report else result
