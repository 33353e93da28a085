"""From a model to its compressed copy in one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from typing_extensions import Unpack  # torch needs it too

from ..blocks import check_lists
from ..errors import ArgumentError
from ..factors import passes_of
from ..layers import check_copyable, chosen_layers, decomposable, opened
from ..measurement import USUAL, check_batches, check_data, first_batch, without_labels
from ..progress import telling
from ..selection import Selection
from ..text import meant
from .findings import smallest_of_quality
from .options import (
    AnalysisOptions,
    CompressOptions,
    PlanOptions,
    check_needs,
    check_plan_options,
    check_quality,
    check_refining,
    importance_of_layers,
    pins_of_layers,
    resolved_precision,
)
from .plan import Plan
from .run_analysis import analyze

_ANALYSIS_OPTIONS, _PLAN_OPTIONS = set(AnalysisOptions.__annotations__), set(PlanOptions.__annotations__)


Lists = str | Sequence[str] | None


def check_refinement(
    model: nn.Module, data: Any, epochs: int, include: Selection, exclude: Selection, blocks: Lists = None
) -> None:
    """Raises what refinement of the chosen layers would raise, as far as one batch tells, before the work."""
    model = opened(model, exclude)
    layers = decomposable(chosen_layers(model, include, exclude))
    check_refining(model, [layer.name for layer in layers], data, epochs, check_lists(blocks))


def compress(
    model: nn.Module,
    *,
    params: float | None = None,
    flops: float | None = None,
    memory: float | str | None = None,
    latency: float | None = None,
    error: float | None = None,
    quality: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    example_inputs: Any = None,
    refit: bool = False,
    refine: bool | int = False,
    blocks: Lists = None,
    **options: Unpack[CompressOptions],
) -> nn.Module:
    """Analyse, plan and apply in one call: a new, smaller model; ``model`` is not changed.

    ``options`` are those of :func:`alds_fast.analyze` (schemes, groups, include, exclude, data, sensitivity, mask,
    moment_order, held_out, moment_memory, precision, progress) and of :meth:`alds_fast.Analysis.plan` (criterion, p,
    method, align, bias_correction, importance, cache, pivots, pins, min_rank, hidden_units).
    ``refit=True`` is ``refit=data`` of :meth:`alds_fast.Plan.apply`, ``refine=True`` is ``refine=data``, and
    ``refine=5`` goes through the data five times; ``blocks`` is for these two.
    ``precision`` is "float32" if it is not given and the plan can be checked, see :meth:`alds_fast.Analysis.plan`.
    Under ``quality=`` it is models with refit and refinement that are evaluated.
    The result is run on ``example_inputs``, or else the first batch of ``data``, before it is given back.
    Raises what these raise, ArgumentError for an unknown option, and ModelError, before the work, for a model that
    cannot be copied.

    >>> import torch
    >>> compress(torch.nn.Linear(64, 64), params=0.5, groups=(1,))
    LowRankLinear(in_features=64, out_features=64, scheme=0, groups=1, rank=17, pivots='output')
    """
    unknown = sorted(set(options) - _ANALYSIS_OPTIONS - _PLAN_OPTIONS)
    if unknown:
        own = set(inspect.signature(compress).parameters) - {"model", "options"}
        known = sorted(own | _ANALYSIS_OPTIONS | _PLAN_OPTIONS)
        raise ArgumentError(f"unknown option {unknown[0]!r}{meant(unknown[0], known)}; options are {', '.join(known)}")
    planning: dict[str, Any] = {k: v for k, v in options.items() if k in _PLAN_OPTIONS}
    if not isinstance(refit, bool):
        raise ArgumentError(
            f"refit is a {type(refit).__name__}: True or False; other batches than data= go to Plan.apply(refit=)"
        )
    passes = passes_of(refine)
    for name, value in (("refit", refit), ("refine", refine)):
        if value:
            check_batches(options.get("data"), f"{name}={value}: data=")
    shares: dict[str, Any] = {"params": params, "flops": flops, "memory": memory, "latency": latency}
    searched = check_quality(quality, evaluate, {**shares, "error": error})
    checked = {**shares, "params": 0.5} if searched else shares
    check_plan_options(checked, error, example_inputs, **planning)  # before the work
    seen = options.get("data") is not None
    asked = planning.get("criterion"), planning.get("method", "alds")
    check_needs(*asked, seen, seen and bool(options.get("sensitivity")), planning.get("hidden_units"))
    if planning.get("importance") or planning.get("pins"):
        whole = opened(model, options.get("exclude"))
        chosen = chosen_layers(whole, options.get("include"), options.get("exclude"))
        importance_of_layers(planning.get("importance"), whole, chosen)
        pins_of_layers(planning.get("pins"), planning.get("min_rank", 1), whole, chosen)
    check_copyable(model)
    if check_lists(blocks) and not (refit or refine):
        raise ArgumentError(f"blocks={blocks!r} goes with refit= or refine=: nothing else goes block by block")
    if refine:
        check_refinement(model, options["data"], passes, options.get("include"), options.get("exclude"), blocks)
    analysing: dict[str, Any] = {k: v for k, v in options.items() if k in _ANALYSIS_OPTIONS - {"progress"}}
    if options.get("data") is None:
        analysing.setdefault("precision", resolved_precision(checked, options.get("criterion"), options.get("method")))
    inputs = example_inputs
    data = options.get("data")
    if data is not None:
        check_data(data)
        data = without_labels(model, data)
        first, analysing["data"] = first_batch(model, data)
        inputs = first if example_inputs is None else example_inputs
    trained: dict[str, Any] = {"refit": data} if refit else {}
    trained |= {"refine": data, "epochs": passes} if refine else {}
    if trained:
        trained |= {"mask": options.get("mask", USUAL), "blocks": blocks}
    apply: Any = partial(Plan.apply, example_inputs=inputs, **trained)
    with telling(options.get("progress")) as tell:
        analysis = analyze(model, example_inputs=example_inputs, **analysing, progress=tell)
        plans = partial(analysis.plan, **planning, example_inputs=example_inputs)
        if searched:
            return smallest_of_quality(model, plans, apply, evaluate, quality, tell)[1]
        return apply(plans(**shares, error=error, progress=tell), model, progress=tell)
