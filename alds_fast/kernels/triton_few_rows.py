"""Low-rank linear layers for few rows in Triton, where reading the weights is all the work.

One launch for the encoder, split over the reduction so that the whole device reads, and one for the decoders of up to
three layers, which adds the parts up. Accumulates in float32. Importing this needs triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import Tiling, addresses, finish, multiple_of_16, precision

MAX_ROWS = 16
MAX_MERGED = 3  # layers that share one encoder launch


@triton.jit
def _encode_rows_kernel(
    x, encoder, parts, M, C_GROUP, RANK, Q, stride_x, channels_per_part,
    BM: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts[s, m, q] = sum over the s-th run of channels: pid 0 is the run, pid 1 a tile of ranks, pid 2 the slice."""
    rows = tl.arange(0, BM)
    r = tl.program_id(1) * BQ + tl.arange(0, BQ)
    k = tl.arange(0, BK)
    group = tl.program_id(2)
    q = (group * RANK + r).to(tl.int64)
    begin = tl.program_id(0) * channels_per_part
    end = tl.minimum(begin + channels_per_part, C_GROUP)
    acc = tl.zeros((BQ, BM), dtype=tl.float32)
    for k0 in range(begin, end, BK):
        c = k0 + k
        et = tl.load(
            encoder + q[:, None] * C_GROUP + c[None, :], mask=(r[:, None] < RANK) & (c[None, :] < end), other=0.0
        )
        place = rows[None, :].to(tl.int64) * stride_x + group * C_GROUP + c[:, None]
        xt = tl.load(x + place, mask=(rows[None, :] < M) & (c[:, None] < end), other=0.0)
        acc = tl.dot(et, xt, acc, input_precision=PRECISION)
    place = (tl.program_id(0) * M + rows[None, :]) * Q + q[:, None]
    tl.store(parts + place, acc, mask=(r[:, None] < RANK) & (rows[None, :] < M))


@triton.jit
def _decode_tile(
    parts, decoder, bias, residual, y, tile, M, Q, first, RANKS, F,
    PARTS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output columns tile * BF of one layer whose hidden values are first .. first + RANKS of Q."""
    rows = tl.arange(0, BM)
    k = tl.arange(0, BK)
    f = tile * BF + tl.arange(0, BF)
    acc = tl.zeros((BM, BF), dtype=tl.float32)
    for k0 in range(0, RANKS, BK):
        q = k0 + k
        keep = (rows[:, None] < M) & (q[None, :] < RANKS)
        h = tl.zeros((BM, BK), dtype=tl.float32)
        for s in tl.static_range(PARTS):
            h += tl.load(parts + (s * M + rows[:, None]) * Q + first + q[None, :], mask=keep, other=0.0)
        place = f[None, :].to(tl.int64) * RANKS + q[:, None]
        dt = tl.load(decoder + place, mask=(f[None, :] < F) & (q[:, None] < RANKS), other=0.0)
        acc = tl.dot(h.to(dt.dtype), dt, acc, input_precision=PRECISION)
    mask = (rows[:, None] < M) & (f[None, :] < F)
    finish(acc, y, bias, residual, rows.to(tl.int64), f, mask, F, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)


@triton.jit
def _decode_rows_kernel(
    parts, decoder0, decoder1, decoder2, bias0, bias1, bias2, residual, y0, y1, y2,
    M, Q, rank0, rank1, rank2, F0, F1, F2,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr,
    HAS_BIAS0: tl.constexpr, HAS_BIAS1: tl.constexpr, HAS_BIAS2: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The decoders of up to three layers, their tiles numbered one after the other."""
    tile = tl.program_id(0)
    tiles0 = tl.cdiv(F0, BF)
    tiles1 = tl.cdiv(F1, BF)
    if tile < tiles0:
        _decode_tile(parts, decoder0, bias0, residual, y0, tile, M, Q, 0, rank0, F0,
                     PARTS, BM, BK, BF, HAS_BIAS0, HAS_RESIDUAL, ACTIVATION, PRECISION)  # fmt: skip
    if LAYERS > 1:  # a constant of the kernel, unlike the next condition
        if (tile >= tiles0) & (tile < tiles0 + tiles1):
            _decode_tile(parts, decoder1, bias1, residual, y1, tile - tiles0, M, Q, rank0, rank1, F1,
                         PARTS, BM, BK, BF, HAS_BIAS1, HAS_RESIDUAL, ACTIVATION, PRECISION)  # fmt: skip
    if LAYERS > 2:
        if tile >= tiles0 + tiles1:
            _decode_tile(parts, decoder2, bias2, residual, y2, tile - tiles0 - tiles1, M, Q, rank0 + rank1, rank2, F2,
                         PARTS, BM, BK, BF, HAS_BIAS2, HAS_RESIDUAL, ACTIVATION, PRECISION)  # fmt: skip


def encode_tiling(dtype: torch.dtype) -> Tiling:
    """Tiles of the encoder's "rows" kernel."""
    return Tiling(16, 32, 16, 4, 3) if dtype == torch.float32 else Tiling(16, 128, 16, 4, 4)


def decode_tiling(dtype: torch.dtype, wide: bool) -> Tiling:
    """Tiles of the decoder's "rows" kernel."""
    return Tiling(16, 64, 16, 4, 3) if wide and dtype != torch.float32 else Tiling(16, 32, 16, 4, 2)


def split(channels: int, tiles: int, reduction: int) -> tuple[int, int]:
    """(parts, channels of each): enough parts for some 256 programs, at most 8, each a multiple of ``reduction``."""
    wanted = max(1, min(8, 256 // max(1, tiles), channels // (2 * reduction)))
    parts = 1 << (wanted.bit_length() - 1)
    per_part = triton.cdiv(channels, parts * reduction) * reduction
    return triton.cdiv(channels, per_part), per_part


def run_rows(x: Tensor, encoder: Tensor, decoders: Sequence[Tensor], biases: Sequence[Tensor | None],
          residual: Tensor | None, groups: int, activation: str | None, ys: Sequence[Tensor]) -> None:  # fmt: skip
    """Fill ys[i] (m, f_i) of up to three layers whose encoders stand one after the other in ``encoder``."""
    m, q, c_group = x.shape[0], encoder.shape[0], x.shape[1] // groups
    t, count = encode_tiling(x.dtype), len(decoders)
    rank_tiles = triton.cdiv(q // groups, t.cols)
    parts, per_part = split(c_group, rank_tiles * groups, t.reduction)
    hidden = torch.empty((parts, m, q), dtype=torch.float32, device=x.device)
    _encode_rows_kernel[parts, rank_tiles, groups](
        x, encoder, hidden, m, c_group, q // groups, q, x.stride(0), per_part,
        BM=t.rows, BK=t.reduction, BQ=t.cols, PRECISION=precision(), num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
    t, three = (
        decode_tiling(x.dtype, multiple_of_16(q, *(n for d in decoders for n in d.shape), *addresses(*decoders))),
        range(MAX_MERGED),
    )
    d, o = ([s[min(i, count - 1)] for i in three] for s in (decoders, ys))
    b = [biases[min(i, count - 1)] for i in three]
    _decode_rows_kernel[sum(triton.cdiv(w.shape[0], t.cols) for w in decoders),](
        hidden, *d, *b, residual, *o, m, q, *(w.shape[1] for w in d), *(w.shape[0] for w in d),
        LAYERS=count, PARTS=parts, BM=t.rows, BK=t.reduction, BF=t.cols, HAS_BIAS0=b[0] is not None,
        HAS_BIAS1=b[1] is not None, HAS_BIAS2=b[2] is not None, HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation or "", PRECISION=precision(), num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip


def run_merged(x: Tensor, encoder: Tensor, decoders: Sequence[Tensor], biases: Sequence[Tensor | None],
               ys: Sequence[Tensor]) -> None:  # fmt: skip
    """Fill ys[i] (m, f_i) of up to three layers that read the same x (m <= 16, c): two launches for all of them.

    ``encoder`` (sum of ranks, c) holds their encoders one after the other.
    """
    run_rows(x, encoder.contiguous(), [d.contiguous() for d in decoders], biases, None, 1, None, ys)
