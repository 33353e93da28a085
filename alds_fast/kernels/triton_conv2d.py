"""Fused low-rank 2-d convolutions in Triton, channels last: an implicit GEMM for the encoder and one for the decoder.

A program owns a tile of output pixels and of filters. Slice after slice, and chunk of ranks after chunk, it computes
the hidden values of its pixels and at once adds their share of the output, which stays on chip: neither the number of
slices nor groups * rank is limited. One kernel serves a k1 x k2 encoder with a 1 x 1 decoder (scheme 0) and a 1 x 1
encoder with a k1 x k2 decoder (scheme 3; the hidden values of a pixel are then recomputed for every tap). More than
256 filters (128 where sizes are no multiples of 16, 64 in float32) are cut into several programs that recompute the
hidden values. Importing this needs triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import Tiling, addresses, finish, multiple_of_16, power_of_two, precision

MAX_FILTERS = 256  # filters of one program, at most


@triton.jit
def _lowrank_conv2d_kernel(
    x, encoder, decoder, bias, residual, y,
    M, H, W, OH, OW, C_GROUP, RANK, F, stride_xn, stride_xh, stride_xw,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DECODER_TAPS: tl.constexpr, CHUNKS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """KH x KW taps belong to the decoder if DECODER_TAPS, else to the encoder; the other half is 1 x 1.

    x (N, C, H, W), encoder (GROUPS * RANK, C_GROUP, ...), decoder (F, GROUPS * RANK, ...), y and residual
    (M pixels, F): all contiguous with the channels last.
    """
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    r = tl.arange(0, BR)
    k = tl.arange(0, BK)
    ENCODER_TAPS: tl.constexpr = 1 if DECODER_TAPS else KH * KW
    OUTER_TAPS: tl.constexpr = KH * KW if DECODER_TAPS else 1
    Q = GROUPS * RANK
    pixel = (rows % (OH * OW)).to(tl.int32)
    top = pixel // OW * SH - PH
    left = pixel % OW * SW - PW
    base = rows // (OH * OW) * stride_xn
    steps = tl.cdiv(C_GROUP, BK)
    acc = tl.zeros((BM, BF), dtype=tl.float32)
    for outer in range(0, GROUPS * CHUNKS * OUTER_TAPS):
        tap_out = outer % OUTER_TAPS
        group = outer // (OUTER_TAPS * CHUNKS)
        rank = outer // OUTER_TAPS % CHUNKS * BR + r
        q = group * RANK + rank
        hidden = tl.zeros((BM, BR), dtype=tl.float32)
        for i in range(0, ENCODER_TAPS * steps):
            tap_in = i // steps
            c = i % steps * BK + k
            tap = tap_in + tap_out
            h = top + tap // KW * DH
            w = left + tap % KW * DW
            inside = (rows < M) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            place = base + h * stride_xh + w * stride_xw + group * C_GROUP
            xt = tl.load(x + place[:, None] + c[None, :], mask=inside[:, None] & (c[None, :] < C_GROUP), other=0.0)
            et = tl.load(
                encoder + (q[None, :] * ENCODER_TAPS + tap_in) * C_GROUP + c[:, None],
                mask=(c[:, None] < C_GROUP) & (rank[None, :] < RANK), other=0.0,
            )  # fmt: skip
            hidden = tl.dot(xt, et, hidden, input_precision=PRECISION)
        dt = tl.load(
            decoder + (f[None, :] * OUTER_TAPS + tap_out) * Q + q[:, None],
            mask=(f[None, :] < F) & (rank[:, None] < RANK), other=0.0,
        )  # fmt: skip
        acc = tl.dot(hidden.to(x.dtype.element_ty), dt, acc, input_precision=PRECISION)
    mask = (rows[:, None] < M) & (f[None, :] < F)
    finish(acc, y, bias, residual, rows, f, mask, F, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)


def max_chunk(dtype: torch.dtype, wide: bool) -> int:
    """Ranks of a slice whose hidden values are on chip at once."""
    return 128 if wide and dtype != torch.float32 else 64


def conv_tiling(chunk: int, filters: int, dtype: torch.dtype, wide: bool) -> Tiling:
    """Tiles by the padded ranks of a chunk and the padded number of filters; the largest tried of which none spills."""
    if dtype == torch.float32:
        cols = min(filters, 64)
        if chunk <= 16 or (chunk == 32 and (wide or cols < 64)):
            return Tiling(32, 32, cols, 4 if wide and (chunk, cols) != (32, 16) else 8, 2)
        return Tiling(16, 32, cols, 8, 2) if cols == 64 else Tiling(32, 32 if wide else 16, cols, 8, 2)
    if not wide:
        return Tiling(64, 32, min(filters, 128), 8, 2)
    cols = min(filters, MAX_FILTERS)
    reduction = 32 if (chunk, cols) == (128, 128) else 64
    return Tiling(64 if cols == MAX_FILTERS else 128, reduction, cols, 4 if cols == 16 and chunk <= 32 else 8, 3)


def run_conv2d(x: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, residual: Tensor | None, groups: int,
               stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], activation: str | None,
               y: Tensor) -> None:  # fmt: skip
    """Fill y (n, f, oh, ow), channels last, from x (n, c, h, w); everything is made channels last first.

    One of encoder and decoder is 1 x 1, the other takes stride, padding and dilation; the arguments are trusted.
    """
    last = torch.channels_last
    x, encoder, decoder = (t.contiguous(memory_format=last) for t in (x, encoder, decoder))
    residual = None if residual is None else residual.contiguous(memory_format=last)
    (n, c, h, w), (filters, q), (oh, ow) = x.shape, decoder.shape[:2], y.shape[2:]
    taps, rank = decoder if decoder.shape[2:].numel() > 1 else encoder, q // groups
    wide = multiple_of_16(c // groups, rank, filters, *addresses(x, encoder, decoder))
    chunk = min(power_of_two(rank), max_chunk(x.dtype, wide))
    t = conv_tiling(chunk, power_of_two(filters), x.dtype, wide)
    _lowrank_conv2d_kernel[triton.cdiv(n * oh * ow, t.rows), triton.cdiv(filters, t.cols)](
        x, encoder, decoder, bias, residual, y,
        n * oh * ow, h, w, oh, ow, c // groups, rank, filters, h * w * c, w * c, c,
        SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[1], DH=dilation[0], DW=dilation[1],
        GROUPS=groups, KH=taps.shape[2], KW=taps.shape[3], DECODER_TAPS=taps is decoder,
        CHUNKS=triton.cdiv(rank, chunk), BM=t.rows, BK=t.reduction, BR=chunk, BF=t.cols, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, ACTIVATION=activation or "", PRECISION=precision(),
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
