"""Truncation of channel slices weighted by what the layer sees: errors of every rank, and the factors of one.

W (f x n) is the weight folded to encode, C = E[x x^T] the second moment of its input, H^T H a weight of its
outputs (the identity, or the gradients' second moment). The error that counts is

    E ||H (W - W_hat) x||^2 = tr(H E C E^T H^T),   E = W - W_hat.

For slice g of fold s, whose columns see the moment S_g = sum over the decoder's taps of C's blocks, the columns of U_g
are the eigenvectors of H W_g S_g W_g^T H^T by falling eigenvalue t_{g,l}, and W_hat_g = H^-1 U_g U_g^T H W_g with the
first ``rank`` of them: no Cholesky factor and no inverse of an input's moment. The error of every rank comes from the
true C, taps and slices that are correlated with one another included; it equals sum_{l>j} t_l where there is one slice
and the decoder has no taps. PCA of the output (Zhang, Zou, He, Sun, TPAMI 2016) is the case H = 1 with one slice.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg import decoder_axes, matrix_shape, permute_weight
from .weights import Weighting, on_filters

EIGEN_NOISE = 1e-10  # eigenvalues below this share of the largest are rounding


def fold_matrix(w: Weighting, matrix: Tensor, scheme: int) -> Tensor:
    """(g0, filters * taps, cols) of the encode-folded (g0, filters, n) matrix."""
    return permute_weight(matrix.reshape(w.shape.weight), w.shape, scheme).reshape(matrix_shape(w.shape, scheme))


def tap_blocks(w: Weighting, scheme: int, second: Tensor | None = None) -> Tensor:
    """The moment (or another one) by the decoder's taps: (g0, taps, cols, taps, cols)."""
    second = w.second if second is None else second
    assert second is not None
    kernel, g0, c = w.shape.kernel, w.shape.conv_groups, w.shape.slice_channels
    dec = decoder_axes(scheme, kernel)
    enc = [a for a in range(len(kernel)) if a not in dec]
    half = [*(2 + a for a in dec), 1, *(2 + a for a in enc)]
    order = [0, *half, *(axis + 1 + len(kernel) for axis in half)]
    taps = math.prod(kernel[a] for a in dec)
    cols = w.shape.numel // w.shape.out_channels // taps
    return second.reshape(g0, c, *kernel, c, *kernel).permute(order).reshape(g0, taps, cols, taps, cols)


def _slice_moments(blocks: Tensor, groups: int) -> Tensor:
    """S_g, (g0, k, cols / k, cols / k)."""
    one_tap = blocks.shape[1] == 1  # then no sum is to be taken up
    whole = blocks[:, 0, :, 0] if one_tap else torch.diagonal(blocks, dim1=1, dim2=3).sum(-1)  # (g0, cols, cols)
    return whole.unflatten(1, (groups, -1)).unflatten(3, (groups, -1)).diagonal(dim1=1, dim2=3).movedim(-1, 1)


class Bases(NamedTuple):
    """Of every slice, H W_g (g0, k, rows, cols / k), U_g (g0, k, rows, r), and eigenvalues (g0, k, r), descending."""

    slices: Tensor
    left: Tensor
    values: Tensor


def bases_of(w: Weighting, scheme: int, groups: int) -> Bases:
    """:func:`slice_bases` with the blocks that they take."""
    return slice_bases(w, scheme, groups, None if w.second is None else tap_blocks(w, scheme))


def slice_bases(w: Weighting, scheme: int, groups: int, blocks: Tensor | None) -> Bases:
    """Every slice's directions by what they carry in the data; ``blocks`` from :func:`tap_blocks`, None without C."""
    weight = on_filters(w.root, w.weight)
    slices = fold_matrix(w, weight, scheme).unflatten(2, (groups, -1)).transpose(1, 2)
    rows, cols = slices.shape[-2:]
    if blocks is None:
        assert w.output is not None
        gram = on_filters(w.root, on_filters(w.root, w.output).mT)
        values, left = torch.linalg.eigh(gram.unsqueeze(1))
        return Bases(slices, left.flip(-1), values.flip(-1).clamp_min(0))
    moments = _slice_moments(blocks, groups)
    if rows <= cols:
        values, left = torch.linalg.eigh(slices @ moments @ slices.mT)
        return Bases(slices, left.flip(-1), values.flip(-1).clamp_min(0))
    energy, vectors = torch.linalg.eigh(moments)
    half = vectors * energy.clamp_min(0).sqrt().unsqueeze(-2)  # (cols, cols): S = half half^T
    seen = slices @ half
    values, right = torch.linalg.eigh(seen.mT @ seen)
    del seen  # as large as the weight
    values = values.flip(-1).clamp_min(0)
    sure = values > EIGEN_NOISE * values[..., :1]
    scale = torch.where(sure, values.clamp_min(1e-300).rsqrt(), 0.0)
    left = slices @ (half @ right.flip(-1) * scale.unsqueeze(-2))
    return Bases(slices, left, torch.where(sure, values, 0.0))


def _pairs(bases: Bases, blocks: Tensor) -> Tensor:
    """N (r, r): the error of rank j is the sum of its entries beyond j in both directions.

    It is the sum of (U^T U) o (R C R^T) over pairs of (tap, slice), and one half of them has the other's transposed
    values. Where there is one tap a slice's own columns are at right angles, and it adds to the diagonal alone.
    """
    k, r = bases.left.shape[1], bases.left.shape[3]
    one_tap, taps = blocks.shape[1] == 1, range(blocks.shape[1])
    right = bases.left.mT @ bases.slices  # (g0, k, r, cols / k)
    left = bases.left.unflatten(2, (-1, len(taps))).movedim(3, 1)  # (g0, taps, k, filters, r)
    total = blocks.new_zeros(r, r)
    for a, b in itertools.combinations_with_replacement(taps, 2):
        cross = blocks[:, a, :, b, :].unflatten(1, (k, -1)).unflatten(3, (k, -1))  # (g0, k, c, k, c)
        for g in range(k - one_tap) if a == b else (None,):  # all slices together where no pair has its mirror here
            these, those = (slice(None),) * 2 if g is None else (slice(g, g + 1), slice(g + one_tap, None))
            seen = (right[:, these] @ cross[:, these, :, those].flatten(3)).unflatten(
                3, cross[:, :, :, those].shape[3:]
            )
            products = seen.permute(0, 3, 1, 2, 4).flatten(2, 3) @ right[:, those].mT  # (g0, those, these * r, r)
            ours = left[:, a, these].mT.flatten(1, 2).unsqueeze(1)  # (g0, 1, these * r, filters)
            pairs = (ours @ left[:, b, those] * products).unflatten(2, (-1, r)).sum((0, 2))  # (those, r, r)
            half = pairs.sum(0)
            total += half + half.mT - (pairs[0] if a == b and not one_tap else 0.0)
    if one_tap:
        own = (right @ _slice_moments(blocks, k) * right).sum(-1) * bases.left.square().sum(-2)
        total.diagonal().add_(own.sum((0, 1)))
    return total


def tails(values: Tensor) -> Tensor:
    """Sums of (g0, k, r) over all slices and from every rank on, (r,)."""
    return values.sum((0, 1)).flip(0).cumsum(0).flip(0)


def relative_errors(squares: Tensor, scale: float) -> Tensor:
    """Relative errors of ranks 0..r from the squares for 0..r - 1."""
    relative = squares / scale if scale > 0 else torch.zeros_like(squares)
    return torch.cat([relative.sqrt(), squares.new_zeros(1)])


def falling(errors: Tensor) -> Tensor:
    """Errors that never grow with the rank: of each rank the largest of it and of those above it."""
    return errors.flip(0).cummax(0).values.flip(0)


def errors(w: Weighting, scheme: int, groups: int, bases: Bases | None = None) -> Tensor:
    """Relative error of every rank 0..r, (r + 1,) float64; that of the full rank is 0.

    For r from :func:`alds_fast.linalg.max_rank`. Without the input's second moment only scheme 0 with one slice.
    ``bases`` are those of the slices, if they are known.
    """
    blocks = None if w.second is None else tap_blocks(w, scheme)
    bases = slice_bases(w, scheme, groups, blocks) if bases is None else bases
    if groups == 1 and (blocks is None or blocks.shape[1] == 1):
        squares = tails(bases.values)
    else:
        assert blocks is not None
        pairs = _pairs(bases, blocks).flip(0, 1).cumsum(0).cumsum(1)
        squares = pairs.diagonal().flip(0).clamp_min(0)
    return relative_errors(squares, w.scale)


def held_out_errors(w: Weighting, scheme: int, groups: int, bases: Bases | None = None) -> Tensor:
    """As :func:`errors`, on the rows that are kept aside, of which there must be some."""
    assert w.held is not None
    blocks = None if w.second is None else tap_blocks(w, scheme)
    bases, rows = bases_of(w, scheme, groups) if bases is None else bases, w.held
    if blocks is None:
        energy = rows.square().sum()
        rows = rows - w.mean.unsqueeze(-2) if w.centred else rows
        at = on_filters(w.root, rows.mT).mT @ bases.left.squeeze(1)
        squares = at.square().sum((0, 1)).flip(0).cumsum(0).flip(0)
    else:
        assert w.mean_input is not None
        energy = (rows @ w.weight.mT).square().sum() if w.relative else rows.new_zeros(())
        rows = rows - w.mean_input.unsqueeze(-2) if w.centred else rows
        if groups == 1 and not w.shape.kernel:  # directions at right angles: no two of them have a product
            at = rows @ (bases.left.mT @ bases.slices).squeeze(1).mT
            squares = at.square().sum((0, 1)).flip(0).cumsum(0).flip(0)
        else:
            pairs = _pairs(bases, tap_blocks(w, scheme, rows.mT @ rows)).flip(0, 1).cumsum(0).cumsum(1)
            squares = pairs.diagonal().flip(0).clamp_min(0)
    scale = float(energy) if w.relative else w.held.shape[1] * w.scale
    return relative_errors(squares, scale)


def certificate(w: Weighting, scheme: int, groups: int) -> Tensor:
    """Upper bound of :func:`errors` from the slices' eigenvalues alone, for every rank; equal where these are exact.

    With D the block diagonal of the slices' moments S_g, once per tap, and mu the largest eigenvalue of
    D^-1/2 C D^-1/2 (pseudo-inverse): ||sum_b E_b x_b||^2 is on average at most mu sum_b tr(E_b D_b E_b^T), so
    error^2 <= mu sum_g sum_{l>j} t_{g,l} / tr(W C W^T), 1 <= mu <= number of blocks for scheme 0.
    """
    if w.second is None:
        return errors(w, scheme, groups)
    blocks = tap_blocks(w, scheme)
    g0, taps, cols = blocks.shape[:3]
    energy, vectors = torch.linalg.eigh(_slice_moments(blocks, groups))
    sure = energy > EIGEN_NOISE * energy.amax((1, 2), keepdim=True)
    root = torch.where(sure, energy.clamp_min(1e-300).rsqrt(), 0.0)
    inverse = (vectors * root.unsqueeze(-2)) @ vectors.mT  # (g0, k, c, c), the pseudo-inverse of D_g^1/2
    split = blocks.reshape(g0, taps, groups, -1, taps * cols)
    half = (inverse.unsqueeze(1) @ split).reshape(g0, taps * cols, taps, groups, -1).permute(0, 2, 3, 4, 1)
    whole = (inverse.unsqueeze(1) @ half).reshape(g0, taps * cols, taps * cols)
    mu = torch.linalg.eigvalsh(whole)[..., -1].clamp_min(1.0)
    return relative_errors(tails(slice_bases(w, scheme, groups, blocks).values * mu[:, None, None]), w.scale)
