"""Folds: how a Linear or convolution weight becomes a matrix, and how factors of its slices become two layers.

A weight of shape ``f x c x k_1 x ... x k_d`` is folded to a matrix by giving each kernel axis either to the rows
(the decoder) or to the columns (the encoder). The channels are cut into ``groups`` equal slices FIRST, then every
slice is folded, so a slice is a run of consecutive columns of the folded matrix.

======  ==========================  ==========================================
scheme  decoder takes               encoder takes
======  ==========================  ==========================================
0       no kernel axis              all kernel axes  ("encode")
1       the first kernel axis       the others       ("split")
2       all but the first           the first        ("split")
3       all kernel axes             none             ("decode")
======  ==========================  ==========================================

A layer that is grouped already (``conv_groups`` = g0 > 1, depthwise included) is g0 independent layers of one shape;
they form the leading batch dimension of the folded matrix and share one (scheme, groups, rank).

Source: Liebenwein, Maalouf, Feldman, Rus, "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
Decomposition", NeurIPS 2021, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError
from .own_memory import own_memory

SCHEMES = (0, 1, 2, 3)
_PREFERENCE = (0, 3, 1, 2)  # which name a fold gets when several schemes coincide


@dataclass(frozen=True)
class WeightShape:
    """Shape of a weight: ``(out_channels, in_channels / conv_groups, *kernel)``; a Linear has an empty kernel."""

    out_channels: int
    in_channels: int
    kernel: tuple[int, ...] = ()
    conv_groups: int = 1

    @property
    def weight(self) -> tuple[int, ...]:
        """Shape of the weight tensor."""
        return (self.out_channels, self.in_channels // self.conv_groups, *self.kernel)

    @property
    def numel(self) -> int:
        """Number of entries of the weight."""
        return math.prod(self.weight)

    @property
    def slice_channels(self) -> int:
        """Channels that ``groups`` must divide: in_channels / conv_groups."""
        return self.in_channels // self.conv_groups

    @property
    def filters_per_group(self) -> int:
        """Filters of one of a convolution's groups: out_channels / conv_groups."""
        return self.out_channels // self.conv_groups

    @property
    def columns(self) -> int:
        """Columns of the encode fold (scheme 0): slice_channels times the kernel's area."""
        return self.slice_channels * math.prod(self.kernel)

    @property
    def smaller_side(self) -> int:
        """The full rank of the encode fold with one slice."""
        return min(self.filters_per_group, self.columns)


def divisors(n: int) -> tuple[int, ...]:
    """All divisors of ``n``, ascending.

    >>> divisors(12)
    (1, 2, 3, 4, 6, 12)
    """
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return tuple(sorted({*small, *(n // k for k in small)}))


def decoder_axes(scheme: int, kernel: Sequence[int]) -> tuple[int, ...]:
    """Kernel axes that the decoder takes; axes of size 1 always stay with the encoder.

    >>> decoder_axes(1, (3, 3)), decoder_axes(3, (1, 5)), decoder_axes(3, ())
    ((0,), (1,), ())
    """
    chosen: Sequence[int]
    axes = range(len(kernel))
    if scheme not in SCHEMES:
        raise ArgumentError(f"scheme {scheme!r} is not one of {SCHEMES}")
    chosen = ((), axes[:1], axes[1:], axes)[scheme]
    return tuple(a for a in chosen if kernel[a] > 1)


def distinct_schemes(schemes: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
    """The requested schemes without those that are the same fold for this kernel.

    >>> distinct_schemes((0, 1, 2, 3), (3, 3)), distinct_schemes((0, 1, 2, 3), (5,)), distinct_schemes((2,), ())
    ((0, 1, 2, 3), (0, 3), (2,))
    """
    kept: dict[tuple[int, ...], int] = {}
    for scheme in _PREFERENCE:
        if scheme in schemes:
            kept.setdefault(decoder_axes(scheme, kernel), scheme)
    return tuple(sorted(kept.values()))


def _split_kernel(scheme: int, kernel: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Kernel sizes of encoder and decoder, with 1 where the other one has the axis."""
    axes = decoder_axes(scheme, kernel)
    encoder = tuple(1 if a in axes else k for a, k in enumerate(kernel))
    return encoder, tuple(k if a in axes else 1 for a, k in enumerate(kernel))


def matrix_shape(shape: WeightShape, scheme: int) -> tuple[int, int, int]:
    """(conv_groups, rows, cols) of the folded weight."""
    encoder, decoder = _split_kernel(scheme, shape.kernel)
    rows = shape.filters_per_group * math.prod(decoder)
    return shape.conv_groups, rows, shape.slice_channels * math.prod(encoder)


def params_per_rank(shape: WeightShape, scheme: int, groups: int) -> int:
    """Parameters that one more rank costs: conv_groups * (groups * rows + cols)."""
    g0, rows, cols = matrix_shape(shape, scheme)
    return g0 * (groups * rows + cols)


def max_rank(shape: WeightShape, scheme: int, groups: int) -> int:
    """Full rank of a slice: min(rows, cols / groups)."""
    _, rows, cols = matrix_shape(shape, scheme)
    return min(rows, cols // groups)


def fold(weight: Tensor, shape: WeightShape, scheme: int) -> Tensor:
    """Folded weight, (conv_groups, rows, cols); slice g of ``groups`` is the g-th run of cols / groups columns."""
    return permute_weight(weight, shape, scheme).reshape(matrix_shape(shape, scheme))


def permute_weight(weight: Tensor, shape: WeightShape, scheme: int) -> Tensor:
    """View of the weight whose dimensions are those of the folded matrix in order: (conv_groups, rows..., cols...)."""
    dec = [3 + a for a in decoder_axes(scheme, shape.kernel)]
    enc = [a for a in range(3, 3 + len(shape.kernel)) if a not in dec]
    return weight.unflatten(0, (shape.conv_groups, -1)).permute(0, 1, *dec, 2, *enc)


def unfold(matrix: Tensor, shape: WeightShape, scheme: int) -> Tensor:
    """Inverse of :func:`fold`: (conv_groups, rows, cols) to the weight's shape."""
    axes = decoder_axes(scheme, shape.kernel)
    rest = [a for a in range(len(shape.kernel)) if a not in axes]
    sizes = [shape.kernel[a] for a in axes], [shape.kernel[a] for a in rest]
    split = matrix.reshape(shape.conv_groups, shape.filters_per_group, *sizes[0], shape.slice_channels, *sizes[1])
    order = [2 + i for i in range(len(axes))], [3 + len(axes) + i for i in range(len(rest))]
    place = dict(zip([*axes, *rest], [*order[0], *order[1]], strict=True))
    kernel = [place[a] for a in range(len(shape.kernel))]
    return split.permute(0, 1, 2 + len(axes), *kernel).reshape(shape.weight)


def factor_shapes(shape: WeightShape, scheme: int, groups: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Weight shapes of the encoder and the decoder.

    Encoder ``(conv_groups * groups * rank, c / groups, *kernel)`` with ``conv_groups * groups`` groups, decoder
    ``(out_channels, groups * rank, *kernel)`` with ``conv_groups`` groups, c = in_channels / conv_groups.
    """
    encoder, decoder = _split_kernel(scheme, shape.kernel)
    outer = (shape.conv_groups * groups * rank, shape.slice_channels // groups, *encoder)
    return outer, (shape.out_channels, groups * rank, *decoder)


def _without_overflow(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, columns of ``left`` with a largest entry of 1.

    A value between the factors is then as large as the largest that it adds to an output, so that it stays in a type's
    range where outputs do. Rows of ``right`` are as large as the largest that they add to a row of the weight.
    """
    largest = left.abs().amax(-2)
    largest = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return left / largest.unsqueeze(-2), right * largest.unsqueeze(-1)


def factors_to_weights(
    left: Tensor, right: Tensor, shape: WeightShape, scheme: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Encoder and decoder weights from the factors of the slices, each in memory of its own, of the factors' type.

    ``left``: (conv_groups, groups, rows, rank); ``right``: (conv_groups, groups, rank, cols / groups). They are scaled
    for weights of type ``dtype``: in float16, whose range is narrow, so that no value between them leaves it.
    """
    if dtype == torch.float16:
        left, right = _without_overflow(left, right)
    encoder_shape, _ = factor_shapes(shape, scheme, left.shape[1], left.shape[3])
    return own_memory(right.reshape(encoder_shape).contiguous()), decoder_weight(left, shape, scheme)


def decoder_weight(left: Tensor, shape: WeightShape, scheme: int) -> Tensor:
    """The decoder's weight from the slices' left factors (conv_groups, groups, rows, rank), in memory of its own."""
    g0, groups, _, rank = left.shape
    kernel = [shape.kernel[a] for a in decoder_axes(scheme, shape.kernel)]
    split = left.reshape(g0, groups, shape.filters_per_group, *kernel, rank)
    axes = range(3, 3 + len(kernel))
    decoder = split.permute(0, 2, 1, 3 + len(kernel), *axes).reshape(factor_shapes(shape, scheme, groups, rank)[1])
    return own_memory(decoder.contiguous())


def slice_factors(
    encoder: Tensor, decoder: Tensor, shape: WeightShape, scheme: int, groups: int
) -> tuple[Tensor, Tensor]:
    """The factors of the slices, left (conv_groups, groups, rows, rank) and right (conv_groups, groups, rank, columns).

    Inverse of :func:`factors_to_weights`.
    """
    g0, rows, cols = matrix_shape(shape, scheme)
    rank = encoder.shape[0] // (g0 * groups)
    kernel = [shape.kernel[a] for a in decoder_axes(scheme, shape.kernel)]
    split = decoder.reshape(g0, shape.filters_per_group, groups, rank, *kernel)
    axes = range(4, 4 + len(kernel))
    left = split.permute(0, 2, 1, *axes, 3).reshape(g0, groups, rows, rank)
    return left, encoder.reshape(g0, groups, rank, cols // groups)


def weights_to_dense(encoder: Tensor, decoder: Tensor, shape: WeightShape, scheme: int, groups: int) -> Tensor:
    """The dense weight that encoder and decoder stand for."""
    left, right = slice_factors(encoder, decoder, shape, scheme, groups)
    g0, rows, cols = matrix_shape(shape, scheme)
    matrix = (left @ right).permute(0, 2, 1, 3).reshape(g0, rows, cols)
    return unfold(matrix, shape, scheme)
