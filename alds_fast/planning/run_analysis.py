"""Analyse a model: the spectra of its layers and, with data, what they see."""

from __future__ import annotations

import dataclasses
import logging
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..checks import check_model
from ..criteria import (
    MAX_DATA_GROUPS,
    Groups,
    LayerSpectra,
    Moments,
    collect_moments,
    layer_spectra,
    total_work,
    with_groups,
)
from ..errors import ArgumentError
from ..layers import (
    DecomposableLayer,
    Layer,
    check_values,
    check_weights_are_there,
    check_whole,
    chosen_layers,
    count_params,
    decomposable,
    label,
    left_out_text,
    opened,
    reader_reason,
    warn_of_questions,
    warn_of_unregistered,
)
from ..linalg import SCHEMES
from ..measurement import Sensitivity, check_data, check_sensitivity, first_batch, weight_readers, without_labels
from ..progress import Progress, ProgressOption, telling
from ..selection import Selection
from .analysis import Analysis
from .options import (
    check_groups,
    check_held_out,
    check_moment_memory,
    check_registered,
    check_schemes,
    is_float32,
)

_LOG = logging.getLogger(__name__)


def _warn_of_zeros(moments: Mapping[str, Moments]) -> None:
    """A UserWarning that names a layer whose input, or output, was zero in all of the data."""
    seen = {name: m.second if m.second is not None else m.output for name, m in moments.items()}
    silent = [name for name, second in seen.items() if second is not None and not bool(second.any())]
    if silent:
        warnings.warn(
            f"{len(silent)} of {len(moments)} layers see nothing but zeros of data=, {label(silent[0])} for one: they "
            f"count as without error at the smallest rank; pass data that reaches them (labels may have been taken for "
            f"an input: pass batches without them), or leave them out with exclude=",
            stacklevel=3,
        )


def _without_used(model: nn.Module, layers: Sequence[Layer], inputs: Any, name: str) -> list[Layer]:
    """The layers, those left out whose weights the model uses itself in a run with the inputs, if there are any."""
    if inputs is None:
        return list(layers)
    modules = {layer.name: layer.module for layer in decomposable(layers)}
    readers = weight_readers(model, modules, inputs, name)
    return [layer.left_out(reader_reason(readers[layer.name])) if layer.name in readers else layer for layer in layers]


def _spectra(
    layers: Sequence[DecomposableLayer], schemes: Sequence[int], groups: Groups, float32: bool, told: Progress
) -> dict[str, LayerSpectra]:
    weights, finished = total_work(layers, schemes), 0

    def done(count: int) -> None:
        nonlocal finished
        finished += count
        told("spectra", finished, weights)

    return {s.layer.name: s for s in layer_spectra(layers, schemes, groups, done, float32=float32)}


def analyze(
    model: nn.Module,
    *,
    schemes: Sequence[int] = SCHEMES,
    groups: Groups = "divisors",
    include: Selection = None,
    exclude: Selection = None,
    data: Iterable[Any] | None = None,
    sensitivity: Sensitivity = False,
    mask: str | None = "attention_mask",
    moment_order: int = 8192,
    held_out: float = 1 / 8,
    moment_memory: int | None = None,
    precision: str = "float64",
    progress: ProgressOption = None,
    example_inputs: Any = None,
) -> Analysis:
    """Spectra of every layer under every fold and number of channel slices; the model is not changed.

    Args:
        model: any ``nn.Module``; its Linear and Conv1d/2d/3d layers are analysed, on CPU or CUDA, in any floating
            type.
        schemes: the folds to try, see :mod:`alds_fast.linalg.folding`.
        groups: numbers of channel slices to try: "divisors" for all divisors of a layer's channels (with data up to 8,
            and one slice of matrices of more than 2^18 weights), or a sequence.
        include, exclude: layers, one or several: shell-style patterns of names, names of modules that hold layers, or
            classes, of layers or of modules that hold them (:class:`alds_fast.selection.ModuleNames`).
        data: batches of the model's inputs, each a tensor, a tuple of positional or a mapping of keyword arguments,
            or inputs and labels (:func:`alds_fast.measurement.without_labels`); the moments of the layers' inputs are
            collected on them, see :func:`alds_fast.criteria.collect_moments`.
        sensitivity: with data, also collect gradients: True for those of the model's first output that is no number (a
            loss is one, where batches have labels), "kl" where that is logits (language models), or a function of
            (output, batch) that returns the tensor whose squared error matters, or a loss.
        mask: name of the argument (samples, tokens) that is 1 at tokens and 0 at padding, which does not count; the
            default stands for all usual names, see :func:`alds_fast.measurement.masks_of`.
        moment_order: layers whose inputs have more entries (channels * kernel area) get the moment of their output,
            which allows the encode fold with one slice only.
        held_out: share of the samples, in [0, 1), that are kept aside, one at least where two differ; plans state the
            error there too (``Plan.held_out``).
        moment_memory: most bytes of the moments together, half of the machine's memory by default. Where they need
            more, gradients are kept as diagonals and then the largest layers judged by their weights; a warning says
            so before the model runs.
        precision: "float64", or "float32" for weights on the CPU of no wider type: spectra in half the time, for plans
            that come to the same (:meth:`Analysis.plan`); leave the model as it is until these are made.
        example_inputs: what the model is run with once, to find layers whose weights its code uses without calling
            them: they stay dense. The first batch of ``data`` serves too. Without both the source code is looked at.
        progress: bars on standard error and in notebooks: True, False, or None for these where it is a terminal; or a
            function, told (what, done, total) as the work goes on, total being 0 where ``data`` has no length.

    Raises:
        WeightError: a parameter has NaN or infinite values, or a buffer NaN; or weights are not there (meta device,
            sharded models).
        LayerNotFoundError: a pattern matches no layer.
        ArgumentError, ModelError: an argument is out of range or not a module; the model does not run.

    >>> import torch
    >>> analysis = analyze(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()))
    >>> plan = analysis.plan(params=0.5)
    >>> plan.params <= 0.5 * analysis.params
    True
    """
    schemes, groups, float32 = check_schemes(schemes), check_groups(groups), is_float32(precision)
    held_out, moment_memory, batches = check_held_out(held_out), check_moment_memory(moment_memory), 0
    if data is not None:
        check_data(data)
        check_model(model)
        batches = operator.length_hint(data)  # a DataLoader may have __len__ and no length
        data = without_labels(model, data)
    check_sensitivity(sensitivity)
    if sensitivity and data is None:
        raise ArgumentError("sensitivity= needs data=: gradients are of what the model returns on batches; pass some")
    given, model = model, opened(model, exclude)
    warn_of_unregistered(given)
    layers = chosen_layers(model, include, exclude)
    check_whole(model)
    check_weights_are_there(layers)
    check_values(model, layers, exclude)
    first, data = first_batch(model, data)
    if data is None and example_inputs is None:
        warn_of_questions(model)
    named = (first, "batch 1 of data=") if example_inputs is None else (example_inputs, "example_inputs")
    check_registered(given, model, *named)
    layers = [with_groups(layer, groups) for layer in _without_used(model, layers, *named)]
    ready = decomposable(layers)
    left_out = f"; left out: {left_out_text(layers)}" if len(ready) < len(layers) else ""
    _LOG.info("%d of %d layers can be decomposed%s", len(ready), len(layers), left_out)
    with telling(progress) as told:
        spectra = _spectra(ready, schemes, groups, float32, told)
        moments = collect_moments(
            model, data, ready, sensitivity=sensitivity, mask=mask, order=moment_order, held_out=held_out,
            memory=moment_memory, done=lambda count: told("moments", count, batches),
        ) if ready and data is not None else {}  # fmt: skip
    _warn_of_zeros(moments)
    analysis = Analysis(tuple(layers), spectra, count_params(given), model, moments, inputs=named[0])
    sliced = data is not None and groups == "divisors"
    return dataclasses.replace(analysis, max_groups=MAX_DATA_GROUPS) if sliced else analysis
