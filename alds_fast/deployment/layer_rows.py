"""One row of the table for every low-rank layer, and for those that read the same input: timed, known or forced."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import BackendError
from ..kernels import MAX_MERGED
from ..layers import LowRankLayer, LowRankLinear, label, tied_names
from ..measurement import shared_inputs
from ..progress import Progress
from .autotune import Specs, autotune_layer, autotune_merged, calls_key
from .table import DeployRow

Case = tuple[Specs, bool]  # what a layer is called with, and whether another module can take its place
MERGED = "merged"  # kind of a row that stands for several layers


def _head(name: str, layer: LowRankLayer) -> tuple[str, str, tuple[int, ...], str]:
    """The first fields of a row."""
    structure = str(layer.decomposition) + ", in order" * layer.in_order
    return name, type(layer).__name__, layer.weight_shape.weight, structure


def _row(name: str, layer: LowRankLayer, case: Case, known: Mapping[str, DeployRow], rounds: int) -> DeployRow:
    specs, plain = case
    if not specs:
        return DeployRow(*_head(name, layer), "", {}, {}, "two-op", "not called with the example inputs", "forced")
    call = calls_key(layer, specs, plain)
    if call in known:
        return replace(known[call], name=name)
    return DeployRow(*_head(name, layer), call, *autotune_layer(layer, specs, rounds, plain), "measured")


def is_known(layer: LowRankLayer, case: Case, known: Mapping[str, DeployRow]) -> bool:
    """Whether the layer is not timed, as a table has it, and does not run with the fused kernel."""
    row = known.get(calls_key(layer, *case))
    return row is not None and not row.won.startswith("fused")


def timed_rows(
    layers: Mapping[str, LowRankLayer], cases: Mapping[str, Case], known: dict[str, DeployRow], rounds: int,
    told: Progress,
) -> list[DeployRow]:  # fmt: skip
    """A row for every layer; layers with the same call are measured once."""
    rows = []
    for name, layer in layers.items():
        rows.append(_row(name, layer, cases[name], known, rounds))
        if rows[-1].call:
            known[rows[-1].call] = rows[-1]
        told("layers timed", len(rows), len(layers))
    return rows


def forced_row(name: str, layer: LowRankLayer, case: Case, backend: str) -> DeployRow:
    """A row of a layer that is to run with the backend; BackendError where it cannot."""
    specs, plain = case
    if not specs:
        return DeployRow(*_head(name, layer), "", {}, {}, "two-op", "not called with the example inputs", "forced")
    if backend == "dense" and not plain:
        raise BackendError(
            f"layer {label(name)}: backend='dense' cannot replace it: it has hooks, a forward of its own or factors "
            f"that other modules hold too"
        )
    for spec in specs if backend == "fused" else ():
        if reason := layer.why_not_fused(spec.empty()):
            raise BackendError(f"layer {label(name)}: backend='fused' cannot run it: {reason}")
    return DeployRow(*_head(name, layer), calls_key(layer, specs, plain), {}, {}, backend, "", "forced")


Members = dict[tuple[str, ...], list[LowRankLinear]]  # two or three layers that read the same tensors, by names


def merge_groups(
    model: nn.Module, example_inputs: Any, layers: Mapping[str, LowRankLayer], cases: Mapping[str, Case]
) -> Members:
    """The layers that can share an encoder call."""
    free = [n for n, m in layers.items() if isinstance(m, LowRankLinear) and m.slices == 1 and cases[n][1]]
    biases = tied_names(model)
    groups = shared_inputs(model, example_inputs, [n for n in free if id(layers[n].bias) not in biases])
    found: Members = {}
    for group in groups:
        for names in (group[i : i + MAX_MERGED] for i in range(0, len(group), MAX_MERGED)):
            members = [layer for n in names if isinstance(layer := layers[n], LowRankLinear)]
            if len(members) > 1 and len({type(m) for m in members}) == 1:  # int8 goes with int8
                found[names] = members
    return found


def merged_rows(
    groups: Members, cases: Mapping[str, Case], rows: Iterable[DeployRow], known: dict[str, DeployRow], rounds: int
) -> list[DeployRow]:
    """A row for every group."""
    won, merged = {row.name: row for row in rows}, []
    for names, members in groups.items():
        call = json.dumps([[won[n].call, won[n].won] for n in names])
        if call not in known:
            result = autotune_merged(members, [won[n].won for n in names], cases[names[0]][0], rounds)
            shape = (sum(m.weight_shape.out_channels for m in members), members[0].weight_shape.in_channels)
            ranks = ", ".join(str(m.rank) for m in members)
            known[call] = DeployRow("", MERGED, shape, f"ranks {ranks}", call, *result, "measured")
        merged.append(replace(known[call], name=" + ".join(names), members=names))
    return merged
