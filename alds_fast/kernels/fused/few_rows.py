"""Low-rank linear layers for few rows in Triton, where reading the weights is all the work.

Two launches: the encoder, then the decoders of up to three layers, which on compute capability 9.0 start before the
encoder has ended (programmatic dependent launch). One or two rows are vector products: a program reads all its weights
at once. Three to 16 rows use the matrix units: the encoder is split over the reduction, and the program that comes last
adds the parts up in their order. Accumulates in float32 and rounds the hidden values to the type of x.

Factors of int8 have a scale for every row (HAS_SCALE): their integers, exact in every type of x, are multiplied as they
are, and the float32 sums with the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..limits import MAX_MERGED, precision
from ..tilings import DecodeKey, EncodeKey, Tiling, any_tuned, capability_of, tuned
from .common import addresses, ceil_div, finish, multiple_of_16, split, warps_of
from .launching import Launch
from .tickets import take_tickets
from .vectors import encode_vectors_kernel, uses_vectors, vector_tile, vector_tiling

ROWS = 16  # of a tile of the matrix units


@triton.jit
def _encode_rows_kernel(
    x, encoder, scale, hidden, parts, tickets, M, C_GROUP, RANK, Q, stride_x, channels_per_part,
    PARTS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr, HAS_SCALE: tl.constexpr,
    EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden (M, Q): pid 0 is a run of channels, pid 1 a tile of ranks, pid 2 the slice.

    parts (PARTS, M, Q) float32 are the sums over the runs. A tile's programs draw tickets; who draws the last one adds
    the parts up, in the order of the runs, and puts the ticket back to 0 for the next launch.
    """
    if EARLY:
        gdc_launch_dependents()
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
        acc = tl.dot(et.to(xt.dtype), xt, acc, input_precision=PRECISION)
    if HAS_SCALE:
        acc *= tl.load(scale + q, mask=r < RANK, other=0.0).to(tl.float32)[:, None]
    keep, place = (r[:, None] < RANK) & (rows[None, :] < M), rows[None, :] * Q + q[:, None]
    if PARTS > 1:
        tl.store(parts + tl.program_id(0) * M * Q + place, acc, mask=keep)
        tl.debug_barrier()  # every thread has stored its part before the ticket is drawn
        ticket = tickets + group * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(ticket, 1, sem="acq_rel") == PARTS - 1:
            total = tl.zeros((BQ, BM), dtype=tl.float32)
            for s in tl.static_range(PARTS):
                total += tl.load(parts + s * M * Q + place, mask=keep, other=0.0, cache_modifier=".cg")
            tl.store(hidden + place, total.to(hidden.dtype.element_ty), mask=keep)
            tl.store(ticket, 0)
    else:
        tl.store(hidden + place, acc.to(hidden.dtype.element_ty), mask=keep)


@triton.jit
def _decode_tile(
    hidden, decoder, scale, bias, residual, outputs, y, tile, M, Q, ROWS, RANKS: tl.constexpr, PIVOTS: tl.constexpr,
    VECTORS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, WAIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Decoder rows tile * BF of one layer with RANKS hidden values; VECTORS rows without matrix units, or 0."""
    f = tile * BF + tl.arange(0, BF)
    column = f
    F = ROWS
    if PIVOTS:
        F = ROWS + RANKS
        column = tl.load(outputs + RANKS + f, mask=f < ROWS, other=F)
    if VECTORS > 0:
        vector_tile(hidden, decoder, scale, bias, residual, y, f, column, f < ROWS, Q, F,
                    RANKS, VECTORS, BK, HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, WAIT)  # fmt: skip
    else:
        rows = tl.arange(0, BM)
        k = tl.arange(0, BK)
        acc = tl.zeros((BF, BM), dtype=tl.float32)
        if WAIT:
            gdc_wait()
        for k0 in range(0, RANKS, BK):
            q = k0 + k
            place = f[:, None].to(tl.int64) * RANKS + q[None, :]
            dt = tl.load(decoder + place, mask=(f[:, None] < ROWS) & (q[None, :] < RANKS), other=0.0)
            keep = (rows[None, :] < M) & (q[:, None] < RANKS)
            ht = tl.load(hidden + rows[None, :] * Q + q[:, None], mask=keep, other=0.0)
            acc = tl.dot(dt.to(ht.dtype), ht, acc, input_precision=PRECISION)
        if HAS_SCALE:
            acc *= tl.load(scale + f, mask=f < ROWS, other=0.0).to(tl.float32)[:, None]
        mask = (rows[:, None] < M) & (f[None, :] < ROWS)
        out = rows.to(tl.int64)
        finish(tl.trans(acc), y, bias, residual, out, column, mask, F, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)


@triton.jit
def _place_pivots(
    hidden, bias, residual, outputs, y, tile, M, Q, F, BM: tl.constexpr, BF: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Hidden values tile * BF, which are outputs, in their columns of y."""
    q = tile * BF + tl.arange(0, BF)
    rows = tl.arange(0, BM).to(tl.int64)
    column = tl.load(outputs + q, mask=q < Q, other=F)
    mask = (rows[:, None] < M) & (q[None, :] < Q)
    if WAIT:
        gdc_wait()
    h = tl.load(hidden + rows[:, None] * Q + q[None, :], mask=mask, other=0.0).to(tl.float32)
    finish(h, y, bias, residual, rows, column, mask, F, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)


@triton.jit
def _decode_rows_kernel(
    hidden, decoder0, decoder1, decoder2, scale0, scale1, scale2, bias0, bias1, bias2, residual, outputs, y0, y1, y2,
    M, Q, F0, F1, F2, RANK0: tl.constexpr, RANK1: tl.constexpr, RANK2: tl.constexpr, PIVOTS: tl.constexpr,
    LAYERS: tl.constexpr, VECTORS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS0: tl.constexpr, HAS_BIAS1: tl.constexpr, HAS_BIAS2: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, WAIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The decoders of up to three layers, their tiles numbered one after the other, after those with PIVOTS."""
    tile = tl.program_id(0)
    if PIVOTS:  # of one layer
        pivot_tiles: tl.constexpr = (RANK0 + BF - 1) // BF
        if tile < pivot_tiles:
            _place_pivots(hidden, bias0, residual, outputs, y0, tile, M, Q, F0 + RANK0,
                          BM, BF, HAS_BIAS0, HAS_RESIDUAL, ACTIVATION, WAIT)  # fmt: skip
        tile -= pivot_tiles
    tiles0 = tl.cdiv(F0, BF)
    tiles1 = tl.cdiv(F1, BF)
    if (tile >= 0) & (tile < tiles0):
        _decode_tile(hidden, decoder0, scale0, bias0, residual, outputs, y0, tile, M, Q, F0, RANK0, PIVOTS,
                     VECTORS, BM, BK, BF, HAS_SCALE, HAS_BIAS0, HAS_RESIDUAL, ACTIVATION, WAIT, PRECISION)  # fmt: skip
    if LAYERS > 1:  # a constant of the kernel, unlike the next condition
        if (tile >= tiles0) & (tile < tiles0 + tiles1):
            _decode_tile(hidden + RANK0, decoder1, scale1, bias1, residual, outputs, y1, tile - tiles0, M, Q, F1,
                         RANK1, False, VECTORS, BM, BK, BF, HAS_SCALE, HAS_BIAS1, HAS_RESIDUAL, ACTIVATION,
                         WAIT, PRECISION)  # fmt: skip
    if LAYERS > 2:
        if tile >= tiles0 + tiles1:
            tile -= tiles0 + tiles1
            _decode_tile(hidden + (RANK0 + RANK1), decoder2, scale2, bias2, residual, outputs, y2, tile, M, Q, F2,
                         RANK2, False, VECTORS, BM, BK, BF, HAS_SCALE, HAS_BIAS2, HAS_RESIDUAL, ACTIVATION,
                         WAIT, PRECISION)  # fmt: skip


def encode_tiling(dtype: torch.dtype, int8: bool = False) -> Tiling:
    """Tiles of the encoder for three rows and more; each warp converts all int8 weights of 16 ranks, so two do."""
    return Tiling(16, 32, 16, 4, 3) if dtype == torch.float32 else Tiling(16, 128, 16, 2 if int8 else 4, 4)


def decode_tiling(dtype: torch.dtype, wide: bool, int8: bool = False) -> Tiling:
    """Tiles of the decoder for three rows and more."""
    if dtype == torch.float32:
        return Tiling(16, 32, 16, 4, 2)
    return Tiling(16, 128, 32, 4, 4) if wide else Tiling(16, 64, 16, 2 if int8 else 4, 3)


def early_launch(x: Tensor) -> bool:
    """Whether the decoder may begin before the encoder has ended: compute capability 9.0 and above."""
    return (capability_of(x.device) or (0, 0)) >= (9, 0)


def _plan_encode(x: Tensor, encoder: Tensor, scale: Tensor | None, groups: int, vectors: bool,
                 early: bool) -> Callable[..., None]:  # fmt: skip
    """What fills hidden (m, q) from (x, encoder, scale, hidden) like these."""
    m, (q, c_group) = x.shape[0], encoder.shape
    rank = q // groups
    int8, t = scale is not None, None
    if any_tuned(x.device):
        rows = m if vectors else ROWS
        t = tuned(x.device, EncodeKey(x.dtype, rows, c_group, q, groups, vectors, precision(), int8))
    if vectors:
        t = t or vector_tiling(c_group, m)
        constants: dict[str, Any] = {"C_GROUP": c_group, "M": m, "BN": t.cols, "BK": t.reduction, "HAS_SCALE": int8,
                                     "EARLY": early}  # fmt: skip
        grid = ceil_div(rank, t.cols), groups
        return Launch(encode_vectors_kernel, grid, (rank, q, x.stride(0)), constants, **warps_of(t))
    t = t or encode_tiling(x.dtype, int8)
    tiles = ceil_div(rank, t.cols)
    count, per_part = split(c_group, tiles * groups, t.reduction, t.parts)
    constants = {"PARTS": count, "BM": t.rows, "BK": t.reduction, "BQ": t.cols, "HAS_SCALE": int8, "EARLY": early,
                 "PRECISION": precision()}  # fmt: skip
    numbers = m, c_group, rank, q, x.stride(0), per_part
    launch = Launch(_encode_rows_kernel, (count, tiles, groups), numbers, constants, **warps_of(t))

    def encode(x: Tensor, *others: Tensor | None) -> None:
        split_up = count > 1
        parts = x.new_empty((count, m, q), dtype=torch.float32) if split_up else None
        launch(x, *others, parts, take_tickets(x.device, tiles * groups) if split_up else None)

    return encode


def plan_few_rows(x: Tensor, encoder: Tensor, decoders: Sequence[Tensor], biases: Sequence[Tensor | None],
              residual: Tensor | None, groups: int, activation: str | None, outputs: Tensor | None,
              scales: Sequence[Tensor]) -> Callable[..., None]:  # fmt: skip
    """What fills ys[i] (m, f_i) of up to three layers whose encoders stand one after the other in ``encoder``.

    It is called with (x, encoder, decoders, biases, residual, outputs, scales, ys), of the sizes, types, strides and
    alignments of these. ``outputs`` of one layer with pivots: which columns of y its hidden values and then its
    decoder's rows are. ``scales`` of int8 factors: that of the encoder's rows, then those of every decoder's.
    """
    m, q, count = x.shape[0], encoder.shape[0], len(decoders)
    filters, ranks = zip(*(d.shape for d in decoders), strict=True)
    vectors, early = uses_vectors(m, encoder.shape[1], *ranks), early_launch(x)
    encode = _plan_encode(x, encoder, scales[0] if scales else None, groups, vectors, early)
    wide = multiple_of_16(q, *(n for d in decoders for n in d.shape), *addresses(*decoders))
    t = None
    if any_tuned(x.device):
        rows, places = m if vectors else ROWS, (outputs is not None, residual is not None)
        of = x.dtype, rows, ranks, filters, vectors
        t = tuned(x.device, DecodeKey(*of, *places, activation, wide, precision(), bool(scales)))
    if t is None:
        t = vector_tiling(max(ranks), m, 4) if vectors else decode_tiling(x.dtype, wide, bool(scales))
    last = [min(i, count - 1) for i in range(MAX_MERGED)]
    constants: dict[str, Any] = {f"RANK{i}": ranks[one] for i, one in enumerate(last)}
    constants |= {f"HAS_BIAS{i}": biases[one] is not None for i, one in enumerate(last)}
    constants |= {
        "PIVOTS": outputs is not None, "LAYERS": count, "VECTORS": m if vectors else 0, "BM": t.rows, "BK": t.reduction,
        "BF": t.cols, "HAS_SCALE": bool(scales), "HAS_RESIDUAL": residual is not None, "ACTIVATION": activation or "",
        "WAIT": early, "PRECISION": precision(),
    }  # fmt: skip
    options: dict[str, Any] = {**warps_of(t), **({"launch_pdl": True} if early else {})}
    tiles = (0 if outputs is None else ceil_div(q, t.cols)) + sum(ceil_div(f, t.cols) for f in filters)
    decode = Launch(_decode_rows_kernel, (tiles,), (m, q, *(filters[i] for i in last)), constants, **options)

    def run(x: Tensor, encoder: Tensor, decoders: Sequence[Tensor], biases: Sequence[Tensor | None],
            residual: Tensor | None, outputs: Tensor | None, scales: Sequence[Tensor],
            ys: Sequence[Tensor]) -> None:  # fmt: skip
        hidden = x.new_empty((m, q))
        encode(x, encoder, scales[0] if scales else None, hidden)
        d, b, y = ([those[i] for i in last] for those in (decoders, biases, ys))
        s = [scales[1 + i] if scales else None for i in last]
        decode(hidden, *d, *s, *b, residual, outputs, *y)

    return run
