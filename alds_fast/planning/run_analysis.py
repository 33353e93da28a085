"""Analyse a model: the spectra of its layers and, with data, what they see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from ..criteria import MAX_DATA_GROUPS, Groups, Sensitivity, collect_moments, layer_spectra, with_groups
from ..layers import Layer, check_weight, count_params, find_layers
from ..linalg import SCHEMES
from .analysis import Analysis
from .options import check_groups, check_schemes, is_single


def analyze(
    model: nn.Module,
    *,
    schemes: Sequence[int] = SCHEMES,
    groups: Groups = "divisors",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    data: Iterable[Any] | None = None,
    sensitivity: Sensitivity = False,
    mask: str | None = "attention_mask",
    moment_order: int = 8192,
    precision: str = "float64",
) -> Analysis:
    """Spectra of every layer under every fold and number of channel slices; the model is not changed.

    Args:
        model: any ``nn.Module``; its Linear and Conv1d/2d/3d layers are analysed, on CPU or CUDA, in any floating
            type.
        schemes: the folds to try, see :mod:`alds_fast.linalg.folding`.
        groups: numbers of channel slices to try: "divisors" for all divisors of a layer's channels, or a sequence.
        include, exclude: shell-style patterns of layer names, one or several.
        data: batches of the model's inputs, each a tensor, a tuple of positional or a mapping of keyword arguments;
            the moments of the layers' inputs are collected on them, see :func:`alds_fast.criteria.collect_moments`.
        sensitivity: with data, also collect gradients: True for those of the model's first output, or a function of
            (output, batch) that returns the tensor whose squared error matters, or a loss.
        mask: name of the keyword argument (samples, tokens) that is 1 at tokens and 0 at padding, which does not count.
        moment_order: layers whose inputs have more entries (channels * kernel area) get the moment of their output,
            which allows the encode fold with one slice only.
        precision: "float64", or "float32" for weights on the CPU of no wider type: spectra in half the time, for plans
            that come to the same (:meth:`Analysis.plan`); leave the model as it is until these are made.

    Raises:
        WeightError: a layer has NaN or infinite weights, or none at all (meta device).
        LayerNotFoundError: a pattern matches no layer.
        ArgumentError, ModelError: an argument is out of range or not a module.

    >>> import torch
    >>> analysis = analyze(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()))
    >>> plan = analysis.plan(params=0.5)
    >>> plan.params <= 0.5 * analysis.params
    True
    """
    found = analyze_with_progress(model, schemes, groups, include, exclude, precision)
    return found if data is None else with_data(found, data, sensitivity, mask, moment_order, groups)


def with_data(
    analysis: Analysis,
    data: Iterable[Any],
    sensitivity: Sensitivity,
    mask: str | None = "attention_mask",
    order: int = 8192,
    groups: Groups = "divisors",
) -> Analysis:
    """The analysis, made with these ``groups``, with moments collected on ``data``; arguments as of analyze."""
    limit = MAX_DATA_GROUPS if groups == "divisors" else None
    layers = [layer for layer in analysis.layers if layer.name in analysis.spectra]
    found = collect_moments(analysis.model, data, layers, sensitivity=sensitivity, mask=mask, order=order)
    own = dict(analysis.spectra)  # plans may put others in their place
    return dataclasses.replace(analysis, spectra=own, moments=found, max_groups=limit, _errors={})


def analyze_with_progress(
    model: nn.Module,
    schemes: Sequence[int],
    groups: Groups,
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    precision: str = "float64",
    start: Callable[[Sequence[Layer]], Callable[[int], None]] = lambda layers: lambda n: None,
) -> Analysis:
    """:func:`analyze` that calls ``start(layers)`` before the work and what that returns after each part of it."""
    schemes, groups, single = check_schemes(schemes), check_groups(groups), is_single(precision)
    layers = [with_groups(layer, groups) for layer in find_layers(model, include, exclude)]
    ready = [layer for layer in layers if layer.reason is None]
    for layer in ready:
        check_weight(layer)
    found = layer_spectra(ready, schemes, groups, start(ready), single=single)
    return Analysis(tuple(layers), {s.layer.name: s for s in found}, count_params(model), model)
