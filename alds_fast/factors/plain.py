"""Factors of the weights alone, many layers at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import linalg
from ..criteria import FoldRoom, batches, for_threads, place
from ..layers import DecomposableLayer, LowRankLayer, low_rank_like, oriented_weight
from .choice import Choice, FactorReport

RECTIFIED = 1 / (math.pi - 1)  # mean^2 / variance of max(0, z), z normal: (1 / 2 pi) / (1 / 2 - 1 / 2 pi)
SLIDING = nn.Conv1d, nn.Conv2d, nn.Conv3d  # whose inputs are mostly rectified, or images: alike from place to place


def _factors(
    batch: Sequence[tuple[Choice, DecomposableLayer]],
    matrices: Sequence[Tensor],
    spectra: Mapping[str, Tensor],
    exact: bool,
) -> list[linalg.Factors]:
    """Factors of a batch; given spectra serve where their norms are those of the weights, others are computed anew."""
    known = [spectra.get(choice.name) for choice, _ in batch]
    chosen = [choice.decomposition for choice, _ in batch]
    values = [v if v is not None else linalg.spectra([m], [[c.groups]])[0][0]
              for v, m, c in zip(known, matrices, chosen, strict=True)]  # fmt: skip
    optima = [linalg.optimal_errors(v, c.rank).flatten().to(m.device)
              for v, m, c in zip(values, matrices, chosen, strict=True)]  # fmt: skip
    groups, ranks = [c.groups for c in chosen], [c.rank for c in chosen]
    results = linalg.batched_rsvd(matrices, groups, ranks, optima, exact=exact)
    for i, (factors, v) in enumerate(zip(results, values, strict=True)):
        if not torch.allclose(factors.norm.cpu(), linalg.optimal_errors(v, 0).flatten(), rtol=1e-10, atol=0.0):
            results[i] = linalg.batched_rsvd([matrices[i]], [groups[i]], [ranks[i]], exact=exact)[0]
    return results


def _report(factors: linalg.Factors, added: float) -> FactorReport:
    if bool((factors.iterations == linalg.EXACT_BY_FALLBACK).any()):
        method = "exact-fallback"
    else:
        method = "randomized" if bool((factors.iterations > 0).any()) else "exact"
    norm = float(factors.norm.sum())
    error = ((float(factors.error.sum()) + added) / norm) ** 0.5 if norm > 0 else 0.0
    return FactorReport(method, max(0, int(factors.iterations.max())), error)


def low_rank_layer(layer: DecomposableLayer, choice: Choice, left: Tensor, right: Tensor) -> LowRankLayer:
    """The layer with factors left (conv_groups, groups, rows, rank) and right (conv_groups, groups, rank, columns)."""
    weight = layer.module.encoder if isinstance(layer.module, LowRankLayer) else layer.module.weight
    assert isinstance(weight, Tensor)
    new = low_rank_like(layer.module, choice.decomposition)
    new.set_factors(left, right, weight)
    return new


def keep_constants(weight: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, float]:
    """The decoder that is best for these encoders if all inputs have one mean; and what that adds to the squared error.

    ``weight`` (conv_groups, filters, n), ``left`` (conv_groups, slices, filters * taps, rank) and ``right``
    (conv_groups, slices, rank, columns) with orthogonal rows, as of a singular value decomposition. For inputs of
    covariance I and mean sqrt(b) 1, b = ``RECTIFIED``, the least E ||(W - L' R) x||^2 is at

        L' = L + b / (1 + b ||P 1||^2) (W - L R) 1 (R^+T 1)^T,   P = R^+ R,

    of rank one more than L at most, in the same shape: what the truncation loses of the response to a constant input,
    spread over the hidden channels by how much of it they see. Frobenius errors grow by
    b^2 / (1 + b ||P 1||^2)^2 ||(W - L R) 1||^2 ||P 1||^2, as the rows of W - L R are orthogonal to those of R.
    """
    taps = left.shape[2] // weight.shape[1]
    sums, norms2 = right.double().sum(-1), right.double().square().sum(-1)
    along = torch.where(norms2 > 0, sums / norms2, 0.0)  # R^+T 1
    seen = taps * (along * sums).sum((1, 2))  # ||P 1||^2, (conv_groups,)
    response = (left.double() @ sums.unsqueeze(-1)).sum((1, 3)).unflatten(1, (-1, taps)).sum(-1)
    step = (weight.double().sum(-1) - response) * (RECTIFIED / (1 + RECTIFIED * seen)).unsqueeze(-1)
    rows = step.repeat_interleave(taps, 1)[:, None, :, None]
    added = float((step.square().sum(-1) * seen).sum())
    return (left.double() + rows * along.unsqueeze(2)).to(left.dtype), added


def plain_layers(
    work: Sequence[tuple[Choice, DecomposableLayer]],
    spectra: Mapping[str, Tensor],
    exact: bool,
    limit: int = 0,
    constants: bool = False,
) -> Iterator[tuple[Choice, LowRankLayer, FactorReport]]:
    """The low-rank layer of every choice, without its bias, and how its factors were computed; as for factorize.

    As many are computed together as :func:`alds_fast.criteria.layer_spectra` does. With ``constants`` convolutions
    :func:`keep_constants`.
    """
    for choice, layer in work:
        if isinstance(layer.module, LowRankLayer):
            cut = linalg.cut_product(*layer.module.slice_factors(), choice.decomposition.rank)
            yield choice, low_rank_layer(layer, choice, cut.left, cut.right), FactorReport("exact", 0, cut.error)
    work = [(choice, layer) for choice, layer in work if layer.fold is None]
    room, limit = FoldRoom(), limit or for_threads([choice.shape.numel for choice, _ in work])
    for batch in batches(work, lambda w: w[0].shape.numel, lambda w: place(w[1]), limit):
        matrices = room.matrices([(layer, choice.decomposition.scheme) for choice, layer in batch])
        for (choice, layer), factors in zip(batch, _factors(batch, matrices, spectra, exact), strict=True):
            split = (choice.shape.conv_groups, choice.decomposition.groups)
            left, right, added = factors.left.unflatten(0, split), factors.right.unflatten(0, split), 0.0
            if constants and isinstance(layer.module, SLIDING):
                weight = oriented_weight(layer.module).detach().reshape(split[0], choice.shape.filters_per_group, -1)
                left, added = keep_constants(weight, left, right)
            yield choice, low_rank_layer(layer, choice, left, right), _report(factors, added)
