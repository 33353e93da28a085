"""The factors of one rank under a :class:`alds_fast.criteria.Weighting`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..criteria import EIGEN_NOISE, Weighting, carried, fold_matrix, off_filters, on_filters, slice_bases, tap_blocks
from ..linalg import Decomposition, matrix_shape, unfold

REFIT_NOISE = 1e-6  # features with less than this share of the largest one's energy are not fitted


class WeightedFactors(NamedTuple):
    """Factors of all slices, left (g0, k, rows, rank) and right (g0, k, rank, cols / k), float64.

    ``shift`` (filters,) is what the bias takes up, E[(W - W_hat) x], zero unless centred; ``error`` the relative error
    reached, never above that of :func:`alds_fast.criteria.weighted_errors.errors`, and ``frobenius``
    ||W - W_hat||_F / ||W||_F.
    """

    left: Tensor
    right: Tensor
    shift: Tensor
    error: float
    frobenius: float


def _complete(slices: Tensor, left: Tensor, values: Tensor, rank: int) -> Tensor:
    """The first ``rank`` columns; those without energy in the data replaced by what the weight itself has most of."""
    left = left[..., :rank].clone()
    sure = (values[..., :rank] > EIGEN_NOISE * values[..., :1]).sum(-1)
    for at in (sure < rank).nonzero().tolist():
        known, matrix = int(sure[tuple(at)]), slices[tuple(at)]
        basis = left[tuple(at)][:, :known]
        rest = torch.linalg.svd(matrix - basis @ (basis.mT @ matrix), full_matrices=False)[0]
        left[tuple(at)][:, known:] = rest[:, : rank - known]
    return left


def _without(root: Tensor | None, left: Tensor) -> Tensor:
    """H^-1 applied to the filters of (g0, k, f * taps, rank)."""
    if root is None:
        return left
    filters = root.shape[1]
    split = left.unflatten(2, (filters, -1)).transpose(1, 2)
    return off_filters(root, split.flatten(2)).view(split.shape).transpose(1, 2).flatten(2, 3)


def _refit_decoder(w: Weighting, scheme: int, left: Tensor, right: Tensor) -> Tensor:
    """The decoder that is best for these encoders on the whole moment: left + (W - W_hat) C Z^T (Z C Z^T)^+."""
    blocks = tap_blocks(w, scheme)
    k, rank = left.shape[1], left.shape[3]
    taps = blocks.shape[1]
    parts = blocks.unflatten(4, (k, -1))  # (g0, taps, cols, taps, k, c)
    seen = torch.einsum("gatbkc,gkrc->gatbkr", parts, right).flatten(3)  # C Z^T, (g0, taps, cols, taps * k * rank)
    inner = torch.einsum("gakcz,gkrc->gakrz", seen.unflatten(2, (k, -1)), right).flatten(1, 3)
    start = left.unflatten(2, (-1, taps)).permute(0, 2, 3, 1, 4).flatten(2)  # (g0, filters, taps * k * rank)
    target = fold_matrix(w, w.weight, scheme).unflatten(1, (-1, taps)).flatten(2) @ seen.flatten(1, 2)
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    sure = values > REFIT_NOISE * values[..., -1:].clamp_min(0)
    scaled = torch.where(sure, 1 / values.clamp_min(1e-300), 0.0).unsqueeze(-2)
    step = (target - start @ inner) @ (vectors * scaled) @ vectors.mT
    return (start + step).unflatten(2, (taps, k, rank)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of ``left`` and rows of ``right`` with one norm each, so that both train and round alike."""
    norms = left.norm(dim=-2), right.norm(dim=-1)
    scale = torch.where((norms[0] > 0) & (norms[1] > 0), norms[1] / norms[0].clamp_min(1e-300), 1.0).sqrt()
    return left * scale.unsqueeze(-2), right / scale.clamp_min(1e-300).unsqueeze(-1)


def factors(w: Weighting, decomposition: Decomposition) -> WeightedFactors:
    """The best factors for a layer's weighting.

    Slices truncated each by its own moment; then, with several slices or taps, the decoder is fitted anew to the whole
    moment, unless that raises the error.
    """
    scheme, groups, rank, _ = decomposition
    blocks = None if w.second is None else tap_blocks(w, scheme)
    bases = slice_bases(w, scheme, groups, blocks)
    basis, values = _complete(bases.slices, bases.left, bases.values, rank), bases.values
    right = basis.mT @ bases.slices
    del bases  # as large as the weight, twice
    left = _without(w.root, basis)
    lost, shift = _lost(w, scheme, left, right), torch.zeros_like(w.mean)
    seen = _energy(w, lost, values, rank)
    if blocks is not None and (groups > 1 or blocks.shape[1] > 1):
        refitted = _refit_decoder(w, scheme, left, right)
        less = _lost(w, scheme, refitted, right)
        if (fitted := _energy(w, less, values, rank)) < seen:
            left, lost, seen = refitted, less, fitted
    left, right = _balance(left, right)
    if w.centred and blocks is not None:
        assert w.mean_input is not None
        shift = (lost @ w.mean_input.unsqueeze(-1)).squeeze(-1)
    elif w.centred:  # W_hat mean = H^-1 U U^T H W mean
        mean = w.mean.unsqueeze(-1)
        kept = basis[:, 0] @ (basis[:, 0].mT @ on_filters(w.root, mean))
        shift = (mean - off_filters(w.root, kept)).squeeze(-1)
    error = math.sqrt(max(0.0, seen / w.scale)) if w.scale > 0 else 0.0
    norm = float(w.weight.norm())
    return WeightedFactors(left, right, shift.flatten(), error, float(lost.norm()) / norm if norm > 0 else 0.0)


def _lost(w: Weighting, scheme: int, left: Tensor, right: Tensor) -> Tensor:
    """W - W_hat, (g0, filters, n)."""
    g0, rows, cols = matrix_shape(w.shape, scheme)
    product = (left @ right).transpose(1, 2).reshape(g0, rows, cols)
    return unfold(product, w.shape, scheme).reshape(w.weight.shape).neg_().add_(w.weight)


def _energy(w: Weighting, lost: Tensor, values: Tensor, rank: int) -> float:
    """E ||H (W - W_hat) x||^2."""
    if w.second is None:
        return float(values[..., rank:].sum())
    return carried(w.root, lost, w.second)
