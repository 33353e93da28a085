"""One or two rows in Triton: vector products, in which a program reads all its weights at once.

Importing this needs triton.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..tilings import Tiling
from .common import activate, power_of_two

MAX_VECTORS = 2  # rows that are multiplied without matrix units
MAX_PIECES = 16  # of 1024 weights, that a program of vector products has in flight for one output


@triton.jit
def vector_tile(
    x, weight, scale, bias, residual, y, n, column, keep, stride_x, stride_y,
    K: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """y[m, column] = activation(weight[n] . x[m] * scale[n] + bias[column] + residual[m, column]) for M <= 2 rows.

    Weights are asked for before x.
    """
    k = tl.arange(0, BK)
    row = weight + n.to(tl.int64)[:, None] * K
    z0 = tl.zeros(n.shape, dtype=tl.float32)
    z1 = z0
    for j in tl.static_range((K + BK - 1) // BK):
        c = j * BK + k
        mask = keep[:, None]
        if (j + 1) * BK > K:
            mask = mask & (c[None, :] < K)
        w = tl.load(row + c[None, :], mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if WAIT and j == 0:
            gdc_wait()
        z0 += tl.sum(w * tl.load(x + c, mask=c < K, other=0.0).to(tl.float32)[None, :], axis=1)
        if M == 2:
            z1 += tl.sum(w * tl.load(x + stride_x + c, mask=c < K, other=0.0).to(tl.float32)[None, :], axis=1)
    exact: tl.constexpr = y.dtype.element_ty == tl.float32
    for m in tl.static_range(M):
        z = z0 if m == 0 else z1
        if HAS_SCALE:
            z *= tl.load(scale + n, mask=keep, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias + column, mask=keep, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            z += tl.load(residual + m * stride_y + column, mask=keep, other=0.0).to(tl.float32)
        tl.store(y + m * stride_y + column, activate(z, ACTIVATION, exact).to(y.dtype.element_ty), mask=keep)


@triton.jit
def encode_vectors_kernel(
    x, encoder, scale, hidden, RANK, Q, stride_x,
    C_GROUP: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HAS_SCALE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """hidden (M, Q): pid 0 is a tile of ranks, pid 1 the slice; EARLY lets the decoder's launch begin."""
    if EARLY:
        gdc_launch_dependents()
    group = tl.program_id(1)
    r = tl.program_id(0) * BN + tl.arange(0, BN)
    n = group * RANK + r
    vector_tile(x + group * C_GROUP, encoder, scale, x, x, hidden, n, n, r < RANK, stride_x, Q,
                C_GROUP, M, BK, HAS_SCALE, False, False, "", False)  # fmt: skip


@functools.lru_cache(maxsize=1024)
def vector_tiling(reduction: int, rows: int, least: int = 1) -> Tiling:
    """Tiles of vector products: some 4096 weights a program and row, ``least`` outputs or more (after an H200)."""
    padded = power_of_two(reduction)
    warps = 8 if rows == 1 and padded == reduction else 4
    return Tiling(rows, min(padded, 1024), max(least, min(16, 4096 * rows // padded)), warps, 1)


def uses_vectors(rows: int, *reductions: int) -> bool:
    """Whether so few rows of reductions so long are multiplied without matrix units."""
    return rows <= MAX_VECTORS and max(reductions) <= 1024 * MAX_PIECES
