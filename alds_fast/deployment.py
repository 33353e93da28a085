"""Deploy a compressed model: measure every low-rank layer on the device and keep the fastest way to run it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import nn

from .deploy_table import DeployRow, DeployTable
from .discover import label
from .errors import ArgumentError, BackendError, ModelError
from .layers import LowRankLayer, LowRankLinear
from .measure import call_model, inference, interleaved_ms, layer_inputs, median_ratio
from .merged import MergedLinears, MergedPart, shared_inputs
from .race import SEPARATE, Specs, call_text, has_hooks, module_for, race, race_merged
from .replace import replace_layers
from .timings import environment

BACKENDS = ("dense", "two-op", "fused")
MERGED = "merged"  # kind of a row that stands for several layers
MAX_MERGED = 3


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _head(name: str, layer: LowRankLayer) -> tuple[str, str, tuple[int, ...], str]:
    """The first fields of a row."""
    structure = f"scheme={layer.scheme}, groups={layer.groups}, rank={layer.rank}"
    return name, type(layer).__name__, layer.weight_shape.weight, structure


def _row(name: str, layer: LowRankLayer, specs: Specs, known: Mapping[str, DeployRow], rounds: int) -> DeployRow:
    head = _head(name, layer)
    if not specs:
        return DeployRow(*head, "", {}, {}, "two-op", "not called with the example inputs", "forced")
    call = call_text(layer, specs)
    if call in known:
        return replace(known[call], name=name)
    return DeployRow(*head, call, *race(layer, specs, rounds), "measured")


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
            if reason := layer.why_not_fused(spec.empty()):
                raise BackendError(f"layer {label(name)}: backend='fused' cannot run it: {reason}")
    return DeployRow(*_head(name, layer), call_text(layer, specs), {}, {}, backend, "", "forced")


def _merged_rows(
    model: nn.Module, example_inputs: Any, layers: Mapping[str, LowRankLayer], inputs: Mapping[str, Specs],
    rows: Sequence[DeployRow], known: Mapping[str, DeployRow], rounds: int,
) -> list[DeployRow]:  # fmt: skip
    """A row for every group of two or three linear layers that read the same tensors."""
    won, found = {row.name: row for row in rows}, []
    free = [n for n, m in layers.items() if isinstance(m, LowRankLinear) and m.groups == 1 and not has_hooks(m)]
    for group in shared_inputs(model, example_inputs, free):
        for names in (group[i : i + MAX_MERGED] for i in range(0, len(group), MAX_MERGED)):
            members = [layer for n in names if isinstance(layer := layers[n], LowRankLinear)]
            if len(members) < 2:
                continue
            call = json.dumps([[won[n].call, won[n].won] for n in names])
            name, ranks = " + ".join(names), ", ".join(str(m.rank) for m in members)
            shape = (sum(m.weight_shape.out_channels for m in members), members[0].weight_shape.in_channels)
            if call in known:
                found.append(replace(known[call], name=name))
                continue
            result = race_merged(members, [won[n].won for n in names], inputs[names[0]], rounds)
            found.append(DeployRow(name, MERGED, shape, f"ranks {ranks}", call, *result, "measured"))
    return found


def _built(model: nn.Module, layers: Mapping[str, LowRankLayer], rows: Iterable[DeployRow]) -> nn.Module:
    """A copy of the model with every layer as the rows say; rows of merged layers come last."""
    new: dict[str, nn.Module] = {}
    for row in rows:
        if row.kind != MERGED:
            new[row.name] = module_for(layers[row.name], row.won)
        elif row.won != SEPARATE:
            names = row.name.split(" + ")
            members = [layer for n in names if isinstance(layer := layers[n], LowRankLinear)]
            merged = MergedLinears(members, row.won).train(members[0].training)
            new |= {n: MergedPart(merged, i).train(merged.training) for i, n in enumerate(names)}
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
    Low-rank linear layers without slices that read the same tensor (q/k/v, gate/up) are also tried with one encoder
    call for two or three of them. The fastest is kept; one that is less than 2 % faster than a simpler one is not. At
    last the whole deployed model is timed against the dense one, and where it is not faster the dense one is returned.
    ``model`` is not changed.

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
        rows += _merged_rows(model, example_inputs, layers, inputs, rows, known, rounds)
    own = [row for row in rows if row.kind != MERGED]
    sides = {side: _built(model, layers, [replace(row, won=side) for row in own]) for side in ("dense", "two-op")}
    sides["deployed"] = _built(model, layers, rows)
    times = _whole_model_ms(sides, example_inputs, rounds)
    slower = backend is None and median_ratio(times, "deployed", "dense") >= 1
    medians = {name: median(ms) for name, ms in times.items()}
    kept = "dense" if slower and any(row.won not in ("dense", SEPARATE) for row in rows) else "deployed"
    found = DeployTable(tuple(rows), environment(_device(model)), medians, kept)
    result = sides[kept]
    object.__setattr__(result, "alds_deployed", found)
    return (result, found) if report else result
