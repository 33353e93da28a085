"""Factors of the weights alone, many layers at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .. import linalg
from ..criteria import FoldRoom, batches, for_threads, place
from ..layers import DecomposableLayer, LowRankLayer, low_rank_like
from .choice import Choice, FactorReport


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


def _report(factors: linalg.Factors) -> FactorReport:
    if bool((factors.iterations == linalg.EXACT_BY_FALLBACK).any()):
        method = "exact-fallback"
    else:
        method = "randomized" if bool((factors.iterations > 0).any()) else "exact"
    norm = float(factors.norm.sum())
    error = (float(factors.error.sum()) / norm) ** 0.5 if norm > 0 else 0.0
    return FactorReport(method, max(0, int(factors.iterations.max())), error)


def low_rank_layer(layer: DecomposableLayer, choice: Choice, left: Tensor, right: Tensor) -> LowRankLayer:
    """The layer with factors left (conv_groups, groups, rows, rank) and right (conv_groups, groups, rank, columns)."""
    weight = layer.module.encoder if isinstance(layer.module, LowRankLayer) else layer.module.weight
    assert isinstance(weight, Tensor)
    new = low_rank_like(layer.module, choice.decomposition)
    new.set_factors(left, right, weight)
    return new


def plain_layers(
    work: Sequence[tuple[Choice, DecomposableLayer]], spectra: Mapping[str, Tensor], exact: bool, limit: int = 0
) -> Iterator[tuple[Choice, LowRankLayer, FactorReport]]:
    """The low-rank layer of every choice, without its bias, and how its factors were computed; as for factorize.

    As many are computed together as :func:`alds_fast.criteria.layer_spectra` does.
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
            pair = factors.left.unflatten(0, split), factors.right.unflatten(0, split)
            yield choice, low_rank_layer(layer, choice, *pair), _report(factors)
