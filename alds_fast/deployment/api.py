"""Deploy a compressed model: measure every low-rank layer on the device and keep the fastest way to run it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import median
from typing import Any, Literal, overload

import torch
from torch import nn

from ..checks import check_model, is_count
from ..errors import ArgumentError
from ..kernels import HAS_TRITON
from ..layers import LowRankLayer, LowRankLinear, MergedLinears, MergedPart, annotate, replace_layers, tied_names
from ..measurement import device_of, environment, layer_inputs
from ..progress import ProgressOption, telling
from ..tuning import Gpu, tune_calls
from .autotune import (
    SEPARATE,
    best_model,
    is_plain,
    model_ratios,
    model_spreads,
    module_for,
    whole_model_ms,
)
from .channel_orders import with_channels_in_order
from .layer_rows import MERGED, forced_row, is_known, merge_groups, merged_rows, timed_rows
from .table import DeployRow, DeployTable, known_rows
from .tuned_forms import fused_calls

_LOG = logging.getLogger(__name__)
FORCED = ("dense", "two-op", "fused")  # what backend= may ask for
Table = DeployTable | str | os.PathLike[str]


def _low_rank(model: nn.Module) -> dict[str, LowRankLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankLayer)}


def _build(model: nn.Module, layers: Mapping[str, LowRankLayer], rows: Iterable[DeployRow]) -> nn.Module:
    """A copy of the model with every layer as the rows say; rows of merged layers come last.

    Layers that keep their form are copied in their place, with everything that hangs on them.
    """
    new: dict[str, nn.Module] = {}
    backends: dict[str, str] = {}
    for row in rows:
        if row.kind != MERGED and row.won in ("two-op", "fused"):
            backends[row.name] = "fused-first" if row.won == "fused" and row.source != "forced" else row.won
        elif row.kind != MERGED:
            new[row.name] = module_for(layers[row.name], row.won)
        elif row.won != SEPARATE:
            members = [layer for n in row.members if isinstance(layer := layers[n], LowRankLinear)]
            backend = "fused-first" if row.won == "fused" else row.won
            merged = MergedLinears(members, backend).train(members[0].training)
            new |= {n: MergedPart(merged, i).train(merged.training) for i, n in enumerate(row.members)}
    result = replace_layers(model, new)
    for name in backends.keys() - new.keys():
        vars(result.get_submodule(name))["backend"] = backends[name]
    return result


def _tuned_on(device: torch.device, tune: bool | None, backend: str | None) -> Gpu | None:
    """Where tilings are found before layers are timed; None for nowhere."""
    if tune is not None and not isinstance(tune, bool):
        raise ArgumentError(f"tune={tune!r} is not True, False or None")
    if tune and (device.type != "cuda" or backend is not None):
        raise ArgumentError(
            f"tune=True goes with backend=None and a model on a CUDA device, not backend={backend!r} on {device}"
        )
    can = device.type == "cuda" and torch.version.cuda is not None and HAS_TRITON and backend is None
    return Gpu(device) if (can if tune is None else tune) else None


@overload
def deploy(
    model: nn.Module, example_inputs: Any, *, backend: str | None = ..., table: Table | None = ..., rounds: int = ...,
    report: Literal[False] = ..., reorder: bool = ..., tune: bool | None = ..., progress: ProgressOption = ...,
) -> nn.Module: ...  # fmt: skip


@overload
def deploy(
    model: nn.Module, example_inputs: Any, *, backend: str | None = ..., table: Table | None = ..., rounds: int = ...,
    report: Literal[True], reorder: bool = ..., tune: bool | None = ..., progress: ProgressOption = ...,
) -> tuple[nn.Module, DeployTable]: ...  # fmt: skip


def deploy(
    model: nn.Module,
    example_inputs: Any,
    *,
    backend: str | None = None,
    table: Table | None = None,
    rounds: int = 7,
    report: bool = False,
    reorder: bool = False,
    tune: bool | None = None,
    progress: ProgressOption = None,
) -> nn.Module | tuple[nn.Module, DeployTable]:
    """A copy of a compressed model in which every low-rank layer runs in the way that was measured to be fastest.

    For every layer, with the inputs that it gets from the example, taking turns: the recomposed dense layer, the two
    library calls, and the fused kernel where it can run; the latter two also with the same function in other shapes
    (fewer slices with a block-diagonal encoder, ranks padded with zeros to a multiple of 8 on the CPU, 16 on a GPU).
    Low-rank linear layers without slices that read the same tensor (q/k/v, gate/up) are also tried with one encoder
    call for two or three of them. The fastest is kept; one that is less than 2 % faster than a simpler one is not. At
    last the whole deployed model is timed against the dense one and the one given, and the fastest is returned. Layers
    with hooks, a forward of their own or shared factors keep their form. ``model`` is not changed (its buffers and
    torch's random state are put back after the runs that it takes); three more copies of it are in memory meanwhile,
    with ``reorder`` four.

    Args:
        model: a model with low-rank layers, on the device and in the type that it will run with.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments of the model.
        backend: None measures; "dense", "two-op" or "fused" force one on every layer that is called.
        table: a :class:`DeployTable` of an earlier call, or the path of a saved one: what it holds for this hardware,
            torch version and thread count is not measured again.
        rounds: turns that every side takes; whole models up to three times as many where these are far apart.
        report: also return the :class:`DeployTable`.
        reorder: layers with output pivots leave these in the order in which they are made, and weights of the layers
            after them are put in that order, see :mod:`alds_fast.deployment.channel_orders`. For models that are run as
            in the example, and of which nobody reads values between layers. A warning says where that cannot be.
        tune: first find tilings of the fused kernels on this device, see :func:`alds_fast.tune`; None does so where the
            model is on a GPU and backend is None. Layers whose tilings are not known yet take seconds there.
        progress: of the layers that are timed, as of :func:`alds_fast.analyze`.

    Returns:
        The deployed module, or (module, table). The table is also the module's ``alds_deployed``; its ``decided`` says
        which model was kept and why, as the logger "alds_fast" does.

    Raises:
        UserWarning: the whole models' rounds are far apart all the same (``DeployTable.steady``).
        ArgumentError: an argument is out of range. ModelError: the example does not run, or nothing can be copied.
        BackendError: backend="fused" where the kernel cannot run a layer. FileFormatError: the table is not one.

    >>> import torch, alds_fast as alds
    >>> small = alds.compress(torch.nn.Sequential(torch.nn.Linear(256, 256)), params=0.25)
    >>> fast, table = deploy(small, torch.randn(64, 256), rounds=3, report=True)
    >>> sorted(table.model_ms), table.rows[0].won in table.rows[0].times_ms
    (['dense', 'deployed', 'two-op'], True)
    """
    check_model(model)
    if backend is not None and backend not in FORCED:
        raise ArgumentError(f"backend={backend!r} is not None or one of {', '.join(FORCED)}")
    if not isinstance(reorder, bool) or (reorder and backend is not None):
        raise ArgumentError(f"reorder={reorder!r} is True or False, and goes with backend=None, not {backend!r}")
    if not is_count(rounds):
        raise ArgumentError(f"rounds={rounds!r} is not an integer >= 1")
    known = known_rows(table, environment(device_of(model)))
    on = _tuned_on(device_of(model), tune, backend)
    given = model
    model = with_channels_in_order(given, example_inputs) if reorder else given
    layers = _low_rank(model)
    if not layers:
        warnings.warn("the model has no low-rank layer: what deploy gives is a copy of it", stacklevel=2)
    inputs, tied = layer_inputs(model, example_inputs, layers), tied_names(model)
    cases = {name: (inputs[name], is_plain(layer, tied)) for name, layer in layers.items()}
    if backend is not None:
        rows = [forced_row(name, layer, cases[name], backend) for name, layer in layers.items()]
    else:
        groups = merge_groups(model, example_inputs, layers, cases)
        with telling(progress) as told:
            if on is not None:
                unknown = {n: m for n, m in layers.items() if not is_known(m, cases[n], known)}
                tune_calls(fused_calls(unknown, groups, cases), on, told)
            rows = timed_rows(layers, cases, known, rounds, told)
        rows += merged_rows(groups, cases, rows, known, rounds)
    unmerged = [row for row in rows if row.kind != MERGED]
    sides = {
        "dense": [replace(row, won="dense" if cases[row.name][1] else "two-op") for row in unmerged],
        "two-op": [replace(row, won="two-op") for row in unmerged],
        "deployed": rows,
    }

    def build(side: str) -> nn.Module:
        base = model if side == "deployed" else given
        return _build(base, _low_rank(base), sides[side])

    times = whole_model_ms({side: build(side) for side in sides}, example_inputs, rounds)
    changed = any(row.won not in ("dense", SEPARATE) for row in rows)
    kept = best_model(times) if backend is None and changed else "deployed"
    decided = (model_ratios(times), model_spreads(times)) if backend is None and changed else ({}, {})
    medians = {name: median(ms) for name, ms in times.items()}
    deployed = DeployTable(tuple(rows), environment(device_of(model)), medians, kept, *decided)
    _LOG.info("deploy: %s", deployed.decided)
    if not deployed.steady:
        warnings.warn(f"deploy: the machine is busy, on a quiet one another may win: {deployed.decided}", stacklevel=2)
    result = build(kept)  # a fresh copy: those that were timed may have counted their calls
    annotate(result, deployed=deployed)
    return (result, deployed) if report else result
