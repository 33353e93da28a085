"""Second moments of the layers' inputs, and of the gradients at their outputs, streamed over batches of data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ...errors import ArgumentError, ModelError
from ...layers import DecomposableLayer, label
from ...measurement import (
    USUAL,
    Samples,
    Sensitivity,
    attribute_set,
    backward_from,
    check_data,
    masks_of,
    naming_batch,
    private_runs,
    signs_of,
)
from .hooks import Collector, Form, moment_forms
from .sums import DiagonalSums, ProductSums


@dataclass(frozen=True)
class Moments:
    """What a layer sees: float64, on the CPU; x is a token or an im2col patch, y = W x without the bias.

    Attributes:
        rows: number of x seen.
        second: E[x x^T], (conv_groups, n, n), n = channels * kernel area of a convolution's group; None for a layer
            whose n is above the limit, where ``output`` serves.
        mean: E[x], (conv_groups, n), or, beside ``output``, E[y], (conv_groups, filters of a group).
        output: E[y y^T], (conv_groups, filters of a group, the same), or None.
        gradient: sum over all rows of g g^T over the sum of the squares of the network's output, g the gradient at y
            of that output's product with random signs; shaped as ``output``, or its diagonal (conv_groups, filters of a
            group) for layers with many filters; zero where that output does not depend on the layer, None if not asked
            for.
        noise, gradient_noise, mean_noise: how far the covariance (of x, or of y beside ``output``), ``gradient`` and
            ``mean`` are from those of all data of this kind: expected squared distance, estimated from how far rows
            and parts of the data are from one another; infinite where nothing is known.
        held: rows x (of y beside ``output``) of samples that are kept aside, (rows, conv_groups, n); None without any.
    """

    rows: int
    second: Tensor | None
    mean: Tensor
    output: Tensor | None = None
    gradient: Tensor | None = None
    noise: float = 0.0
    gradient_noise: float = 0.0
    mean_noise: float = 0.0
    held: Tensor | None = None


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient; the flags are put back at the end."""
    with attribute_set((p for p in model.parameters() if not p.is_inference()), "requires_grad", False):
        yield


def collect_moments(
    model: nn.Module,
    data: Iterable[Any],
    layers: Sequence[DecomposableLayer],
    *,
    sensitivity: Sensitivity = False,
    mask: str | None = USUAL,
    order: int = 8192,
    held_out: float = 0.0,
    memory: int | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> dict[str, Moments]:
    """Moments of the layers over all batches of ``data``, by name; layers that are never called are left out.

    The model runs once per batch in evaluation mode; it is left as it was. Of a convolution's patches, which overlap,
    so many are drawn at random that their product costs as much as the layer itself, one in 64 at least, no more than
    their width, or 512, per call. Memory beside the result: one product of the largest order in the type of
    the data, and the rows of one call.

    Args:
        data: batches, each a tensor, a tuple or list of positional or a mapping of keyword arguments of the model.
        sensitivity: also collect gradients: True for those of the model's first output that is no number, "kl"
            where that is logits, for the Kullback-Leibler divergence, or a function of (output, batch) that returns the
            tensor whose squared error matters, or a loss (0-dimensional).
        mask: name of an argument (samples, tokens), 1 or True at tokens and 0 or False at padding, which is not counted
            in Linear layers; the other way round for torch's "..._key_padding_mask". The default stands for all usual
            names, see :func:`alds_fast.measurement.masks_of`.
        order: layers with more columns than this get the moment of their output instead.
        held_out: share of the samples, in [0, 1), of which rows are kept aside, one at least where two differ; they do
            not count in the moments.
        memory: most bytes of the moments together, None for any number. What does not fit is kept as a diagonal
            (gradients), or not at all; a warning says so before the model runs.
        done: told the number of batches finished, after each.

    Raises:
        ArgumentError: no batches, a batch that is nothing that can be passed on, no layer that sees any of it, a mask
            that is none or, but for the default, in no batch, or ``sensitivity`` in inference mode.
        ModelError: the model raised an exception, or a layer sees NaN.
    """
    forms = moment_forms(layers, order, bool(sensitivity), memory)
    _warn_of_reductions(layers, forms, order, bool(sensitivity), memory)
    layers = [layer for layer in layers if layer.name in forms]
    collector, samples = Collector(layers, forms, bool(sensitivity)), Samples(held_out)
    check_data(data)
    if sensitivity:
        check_gradients_are_possible(model)
    count, masks = 0, 0
    with collector.hooks(), private_runs(model) as run, frozen(model):
        for count, batch in enumerate(data, 1):
            collector.begin(count, masks_of(model, batch, mask), samples.aside(batch))
            masks += bool(collector.masks)
            with naming_batch(count, "data="), torch.set_grad_enabled(bool(sensitivity)):
                output = run(batch, count, f"batch {count} of data=")
                if sensitivity:
                    collector.back = True
                    collector.energy += backward_from(output, batch, sensitivity, signs_of(count))
                    collector.back = False
            done(count)
    if not count:
        raise ArgumentError("data= has no batches; an iterator can be used once only")
    if not masks and mask not in (None, USUAL):
        raise ArgumentError(f"mask={mask!r} is an argument of no batch of data=")
    if masks and collector.tokens and not collector.masked:
        warn_of_masks()
    moments = moments_of(collector, samples.worth)
    if layers and not moments:
        refuse_unreached()
    return moments


def warn_of_masks() -> None:
    """Say that no mask fits."""
    warnings.warn(
        "the masks of data= fit the input of no layer: all tokens count, padding too; leave padding out of the "
        "batches, or say so by mask=None",
        stacklevel=4,
    )


def refuse_unreached() -> NoReturn:
    """ArgumentError: no layer sees any of the data."""
    raise ArgumentError(
        "data= reaches none of the layers: they get no rows, nothing but padding, or the model reads their "
        "weights, or calls their forward(), without calling them"
    )


def check_gradients_are_possible(model: nn.Module) -> None:
    """ArgumentError in torch.inference_mode(), or where a parameter was made in it."""
    if torch.is_inference_mode_enabled():
        raise ArgumentError(
            "sensitivity= needs gradients, which torch.inference_mode() forbids: call it outside of that"
        )
    if name := next((n for n, p in model.named_parameters() if p.is_inference()), None):
        raise ArgumentError(
            f"sensitivity= needs gradients, and parameter {name!r} was made in torch.inference_mode(), which allows "
            f"none: make or load the model outside of that, or leave out sensitivity="
        )


def _warn_of_reductions(
    layers: Sequence[DecomposableLayer], forms: Mapping[str, Form], order: int, gradients: bool, memory: int | None
) -> None:
    """Say what is kept in less than its usual form because of ``memory``."""
    usual = moment_forms(layers, order, gradients, None)
    diagonal = [name for name, form in forms.items() if form != usual[name]]
    dropped = [name for name in usual if name not in forms]
    if (not diagonal and not dropped) or memory is None:
        return
    need = sum(usual[layer.name].size(layer.shape, gradients) for layer in layers if layer.name in usual)
    parts = [f"the gradients of {len(diagonal)} layers are kept as a diagonal"] if diagonal else []
    parts += [f"{len(dropped)} layers, {label(dropped[0])} for one, are judged by their weights"] if dropped else []
    warnings.warn(
        f"the moments of all layers take {need / 1e9:.2f} GB, moment_memory= allows {memory / 1e9:.2f}: "
        f"{' and '.join(parts)}; raise moment_memory=, or leave layers out with exclude=",
        stacklevel=4,
    )


def check_moment(layer: DecomposableLayer, second: Tensor | None, gradient: Tensor | None) -> None:
    """ModelError for NaN or infinite values."""
    for name, value in (("input", second), ("gradient", gradient)):
        squares = value if value is None or value.dim() == 2 else value.diagonal(dim1=-2, dim2=-1)
        if squares is not None and not bool(squares.isfinite().all()):
            _refuse(layer, name)


def _refuse(layer: DecomposableLayer, name: str) -> NoReturn:
    raise ModelError(
        f"layer {label(layer.name)}: its {name} has NaN or infinite values on this data; mend the data, or "
        f"leave the layer out with exclude={[layer.name]!r}"
    )


def gradient_over(sums: ProductSums | DiagonalSums, energy: float, distinct: float) -> tuple[Tensor, float]:
    """The gradients' moment, whole or its diagonal, and its noise."""
    if isinstance(sums, DiagonalSums):
        return sums.over(energy, distinct)
    second, _, noise, _ = sums.over(energy, distinct)
    return second, noise


def moments_of(collector: Collector, distinct: float) -> dict[str, Moments]:
    """By name, for the layers that were called; layers with one and the same input share its moment."""
    moments: dict[str, Moments] = {}
    for layer in collector.layers:
        sums, gradient, gradient_noise = collector.sums[layer.name], None, 0.0
        if not sums.rows:
            continue
        if collector.gradients and collector.gradient_sums[layer.name].rows and collector.energy > 0:
            gradient, gradient_noise = gradient_over(collector.gradient_sums[layer.name], collector.energy, distinct)
        elif collector.gradients:  # what matters does not depend on this layer
            size = [layer.shape.conv_groups, layer.shape.filters_per_group]
            size += [] if isinstance(collector.gradient_sums[layer.name], DiagonalSums) else size[1:]
            gradient = torch.zeros(size, dtype=torch.float64, device="cpu")
        rows, (second, mean, noise, mean_noise) = sums.rows, sums.over(sums.rows, distinct)
        for other in collector.leaders[layer.name] & moments.keys():
            shared = moments[other].second
            if shared is not None and torch.equal(shared, second):
                second = shared
        held = collector.held[layer.name].rows()
        check_moment(layer, second, gradient)
        if held is not None and not bool(held.isfinite().all()):
            _refuse(layer, "input")
        by_output = layer.name in collector.by_output
        inner, outer = (None, second) if by_output else (second, None)
        moments[layer.name] = Moments(rows, inner, mean, outer, gradient, noise, gradient_noise, mean_noise, held)
    return moments
