"""The low-rank convolution by rows of taps in Triton: a kernel that :mod:`alds_fast.kernels.fused.conv2d` launches.

Importing this needs triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import finish


@triton.jit
def _halves(z, BM: tl.constexpr, COLS: tl.constexpr):
    """z (BM, 2 * COLS) as its left and its right half."""
    return tl.split(tl.permute(tl.reshape(z, (BM, 2, COLS)), (0, 2, 1)))


@triton.jit
def _shifted(z, i, w, W, BY: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr):
    """The rows of z (BM, BR) that are BY further on, 0 where these are pixels of another row of the image."""
    place = tl.broadcast_to(tl.minimum(tl.maximum(i + BY, 0), BM - 1)[:, None], (BM, BR))
    return tl.where(((w + BY >= 0) & (w + BY < W))[:, None], tl.gather(z, place, 0), 0.0)


@triton.jit
def conv2d_rows_kernel(
    x, encoder, decoder, bias, residual, y, M, H, W,
    C: tl.constexpr, RANK: tl.constexpr, F: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr,
    PH: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr,
    SIZE: tl.constexpr, FAR: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stride 1, KH x KW taps (KW 3 or 5) and the padding that keeps the size; C / GROUPS is a multiple of BK.

    A program multiplies BM pixels in a row, of which it delivers all but the first and last KW // 2 * DW: their
    neighbours to the left and right belong to other programs. Arguments as of the kernel by taps, SIZE (H, W) or ().
    """
    if len(SIZE) > 0:
        H = SIZE[0]
        W = SIZE[1]
    CG: tl.constexpr = C // GROUPS
    STEPS: tl.constexpr = CG // BK
    K: tl.constexpr = KH * KW * CG
    SUMS: tl.constexpr = 4 if KW == 3 else 8  # of every hidden value, one a tap, the last without one
    HALO: tl.constexpr = KW // 2 * DW
    Q: tl.constexpr = GROUPS * RANK
    first = tl.program_id(0).to(tl.int64) * (BM - 2 * HALO) - HALO  # the pixel of the tile's first row; it may be < 0
    n0 = tl.maximum(first, 0) // (H * W)
    i = tl.arange(0, BM)
    local = (first - n0 * H * W).to(tl.int32) + i
    n = local // (H * W)
    pixel = local - n * H * W
    h = pixel // W
    w = pixel % W
    keep = (i + first >= 0) & (i + first < M)
    k = tl.arange(0, BK)
    column = tl.arange(0, SUMS * BR)
    tap = column // BR
    r = column % BR
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    if FAR:
        n = n.to(tl.int64)
    place = (((n * H + h - PH) * W + w) * C)[:, None] + k[None, :]
    xb = x + n0 * H * W * C
    e_place = (r * K + tap * CG)[None, :] + k[:, None]
    acc = tl.zeros((BM, BF), dtype=tl.float32)
    for outer in tl.range(0, GROUPS * CHUNKS):
        group = outer // CHUNKS
        r0 = outer % CHUNKS * BR
        eb = encoder + (group * RANK + r0) * K
        z = tl.zeros((BM, SUMS * BR), dtype=tl.float32)
        for s in tl.range(0, KH * STEPS):
            t = s // STEPS
            c0 = (s - t * STEPS) * BK
            top = h + (t * DH - PH)
            x_mask = (keep & (top >= 0) & (top < H))[:, None]
            xt = tl.load(xb + (t * DH * W * C + group * CG + c0) + place, mask=x_mask, other=0.0)
            e_mask = (tap[None, :] < KW) & (r0 + r[None, :] < RANK)
            et = tl.load(eb + (t * KW * CG + c0) + e_place, mask=e_mask, other=0.0)
            z = tl.dot(xt, et, z, input_precision=PRECISION)
        if KW == 3:
            left, right = _halves(z, BM, 2 * BR)
            z0, z1 = _halves(left, BM, BR)
            z2, _ = _halves(right, BM, BR)
            hidden = z1 + _shifted(z0, i, w, W, -DW, BM, BR) + _shifted(z2, i, w, W, DW, BM, BR)
        else:
            left, right = _halves(z, BM, 4 * BR)
            left, middle = _halves(left, BM, 2 * BR)
            right, _ = _halves(right, BM, 2 * BR)
            z0, z1 = _halves(left, BM, BR)
            z2, z3 = _halves(middle, BM, BR)
            z4, _ = _halves(right, BM, BR)
            hidden = z2 + _shifted(z1, i, w, W, -DW, BM, BR) + _shifted(z3, i, w, W, DW, BM, BR)
            hidden += _shifted(z0, i, w, W, -2 * DW, BM, BR) + _shifted(z4, i, w, W, 2 * DW, BM, BR)
        rank = r0 + tl.arange(0, BR)
        d_place = f[None, :] * Q + (group * RANK + rank)[:, None]
        dt = tl.load(decoder + d_place, mask=(f[None, :] < F) & (rank[:, None] < RANK), other=0.0)
        acc = tl.dot(hidden.to(x.dtype.element_ty), dt, acc, input_precision=PRECISION)
    mask = (keep & (i >= HALO) & (i < BM - HALO))[:, None] & (f[None, :] < F)
    finish(acc, y, bias, residual, first + i, f, mask, F, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)
