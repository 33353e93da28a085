"""Turn choices of (scheme, groups, rank) into a new model with low-rank layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import linalg
from ..criteria import FoldRoom, Weighting, batches, for_threads, place
from ..errors import LayerNotFoundError, PlanError
from ..layers import Layer, LowRankLayer, check_weight, find_layers, label, low_rank_like, replace_layers
from ..linalg import WeightShape, factors_to_weights
from .weighted import factors as weighted_factors


class Choice(NamedTuple):
    """A layer by name, the weight shape it must have, and what replaces it."""

    name: str
    shape: WeightShape
    scheme: int
    groups: int
    rank: int


@dataclass(frozen=True)
class FactorReport:
    """How one layer's factors were computed.

    ``method``: "randomized" (certificate met), "exact" (chosen, a sketch would cost more), "exact-fallback" (some
    slice's sketch did not meet its certificate), "weighted" (by the data's moments) or "refitted" (to what reaches the
    layer in the compressed network); ``iterations``: most power iterations over the slices; ``error``:
    ||W - W_hat||_F / ||W||_F before rounding to the weight's type; ``data_error``: the relative error reached on the
    data by the plan's criterion, or, if refitted, of the layer's output against the dense network's; NaN without.
    """

    method: str
    iterations: int
    error: float
    data_error: float = math.nan


def _resolve(model: nn.Module, choices: Sequence[Choice]) -> list[Layer]:
    """The model's layers for the choices, checked."""
    layers = {layer.name: layer for layer in find_layers(model)}
    found = []
    for choice in choices:
        layer = layers.get(choice.name)
        if layer is None:
            raise LayerNotFoundError(f"the plan's layer {label(choice.name)} is not in the model")
        if layer.reason is not None:
            raise PlanError(f"layer {label(choice.name)} cannot be replaced: {layer.reason}")
        if layer.shape != choice.shape:
            raise PlanError(
                f"layer {label(choice.name)}: the plan was made for {choice.shape}, the model has {layer.shape}; "
                f"analyse this model again"
            )
        found.append(layer)
    return found


def _factors(
    batch: Sequence[tuple[Choice, Layer]], matrices: Sequence[Tensor], spectra: Mapping[str, Tensor], exact: bool
) -> list[linalg.Factors]:
    """Factors of a batch; given spectra serve where their norms are those of the weights, others are computed anew."""
    known = [spectra.get(choice.name) for choice, _ in batch]
    values = [v if v is not None else linalg.spectra([m], [[c.groups]])[0][0]
              for v, m, (c, _) in zip(known, matrices, batch, strict=True)]  # fmt: skip
    optima = [linalg.optimal_errors(v, c.rank).flatten().to(m.device)
              for v, m, (c, _) in zip(values, matrices, batch, strict=True)]  # fmt: skip
    found = linalg.batched_rsvd(matrices, [c.groups for c, _ in batch], [c.rank for c, _ in batch], optima, exact=exact)
    for i, (factors, v) in enumerate(zip(found, values, strict=True)):
        if not torch.allclose(factors.norm.cpu(), linalg.optimal_errors(v, 0).flatten(), rtol=1e-10, atol=0.0):
            found[i] = linalg.batched_rsvd([matrices[i]], [batch[i][0].groups], [batch[i][0].rank], exact=exact)[0]
    return found


def _report(factors: linalg.Factors) -> FactorReport:
    if bool((factors.iterations == linalg.EXACT_BY_FALLBACK).any()):
        method = "exact-fallback"
    else:
        method = "randomized" if bool((factors.iterations > 0).any()) else "exact"
    norm = float(factors.norm.sum())
    error = (float(factors.error.sum()) / norm) ** 0.5 if norm > 0 else 0.0
    return FactorReport(method, max(0, int(factors.iterations.max())), error)


def _low_rank_layer(layer: Layer, choice: Choice, left: Tensor, right: Tensor) -> LowRankLayer:
    """The layer with factors left (conv_groups, groups, rows, rank) and right (conv_groups, groups, rank, columns)."""
    weight = layer.module.weight
    assert isinstance(weight, Tensor)
    encoder, decoder = factors_to_weights(left, right, choice.shape, choice.scheme)
    new = low_rank_like(layer.module, choice.scheme, choice.groups, choice.rank)
    new.encoder = nn.Parameter(encoder.to(weight), weight.requires_grad)
    new.decoder = nn.Parameter(decoder.to(weight), weight.requires_grad)
    return new


def plain_layers(
    work: Sequence[tuple[Choice, Layer]], spectra: Mapping[str, Tensor], exact: bool, limit: int = 0
) -> Iterator[tuple[Choice, LowRankLayer, FactorReport]]:
    """The low-rank layer of every choice, without its bias, and how its factors were computed; as for factorize.

    As many are computed together as :func:`alds_fast.criteria.layer_spectra` does.
    """
    room, limit = FoldRoom(), limit or for_threads([choice.shape.numel for choice, _ in work])
    for batch in batches(work, lambda w: w[0].shape.numel, lambda w: place(w[1]), limit):
        matrices = room.matrices([(layer, choice.scheme) for choice, layer in batch])
        for (choice, layer), factors in zip(batch, _factors(batch, matrices, spectra, exact), strict=True):
            split = (choice.shape.conv_groups, choice.groups)
            pair = factors.left.unflatten(0, split), factors.right.unflatten(0, split)
            yield choice, _low_rank_layer(layer, choice, *pair), _report(factors)


def factorize(
    model: nn.Module,
    choices: Sequence[Choice],
    spectra: Mapping[str, Tensor] | None = None,
    *,
    exact: bool = False,
    weighted: Callable[[Layer], Weighting | None] = lambda layer: None,
) -> tuple[nn.Module, dict[str, FactorReport]]:
    """A new model with the chosen layers replaced by low-rank ones, and how their factors were computed.

    ``spectra[name]``, if given, holds the singular values (conv_groups, groups, r) of the layer's chosen slices; they
    serve as the certificate's optimum where their norms are those of the weight's slices, and are computed otherwise.
    ``exact`` asks for exact decompositions only. A layer for which ``weighted`` returns a weighting gets the factors
    that are best for it, and a bias that takes up the mean of the error. ``model`` is not changed. Raises
    LayerNotFoundError, PlanError or WeightError where a choice does not fit the model.
    """
    work = list(zip(choices, _resolve(model, choices), strict=True))
    for _, layer in work:
        check_weight(layer)
    new: dict[str, LowRankLayer] = {}
    reports: dict[str, FactorReport] = {}
    shifts: dict[str, Tensor] = {}
    plain = []
    for choice, layer in work:
        weights = weighted(layer)
        if weights is None:
            plain.append((choice, layer))
            continue
        best = weighted_factors(weights, choice.scheme, choice.groups, choice.rank)
        new[choice.name] = _low_rank_layer(layer, choice, best.left, best.right)
        shifts[choice.name] = best.shift
        reports[choice.name] = FactorReport("weighted", 0, best.frobenius, best.error)
    for choice, low, report in plain_layers(plain, spectra or {}, exact):
        new[choice.name], reports[choice.name] = low, report
    small = replace_layers(model, new)
    _shift_biases(new, shifts)
    return small, reports


@torch.no_grad()
def _shift_biases(new: Mapping[str, LowRankLayer], shifts: Mapping[str, Tensor]) -> None:
    for name, shift in shifts.items():
        bias = new[name].bias
        if bias is not None and bool(shift.any()):
            bias.copy_(bias.double().cpu() + shift)
