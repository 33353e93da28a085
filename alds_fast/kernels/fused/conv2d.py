"""Fused low-rank 2-d convolutions in Triton: a k1 x k2 encoder, then a 1 x 1 decoder (scheme 0).

One launch: a program computes the hidden values of its pixels, some ranks of a slice at a time, and multiplies them
with its part of the decoder, so that groups * rank channels are neither written to memory nor read back. There are two
ways through the encoder. By taps: every tap reads its pixels anew. By rows, for stride 1 and kernels 3 or 5 wide: the
pixels of a row of taps are read once and multiplied with the filters of its taps side by side, and these partial sums
are shifted by pixels and added; a third or a fifth of the reads, but 4 or 8 times the hidden values at once.

Accumulates in float32 and rounds the hidden values to the type of x, as two library calls do. The sizes of the layer
are constants of the kernels, and so is the first size of images that a layer sees: it saves a fifth of the
instructions. Images of other sizes share a kernel that takes any. Importing this needs triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..limits import precision
from ..tilings import ConvKey, Tiling, can_go_by_rows, tuned
from .common import addresses, ceil_div, finish, is_far, multiple_of_16, power_of_two, size_class, warps_of
from .conv2d_rows import conv2d_rows_kernel
from .launching import Launch

MAX_FILTERS = 256  # output columns of a program; more are cut into several, each with the hidden values of its own
MAX_CHUNK = 128  # ranks of a slice whose hidden values are on chip at once
MAX_ROWS_RANK = 32  # ranks up to which rows of taps were measured to be faster (H200)
_first_sizes: dict[tuple, tuple[int, int]] = {}  # of images, by the key but for sizes: constants of its kernel
FEW_PROGRAMS = 264  # two a multiprocessor on an H200: fewer leave it idle


@triton.jit
def _conv2d_taps_kernel(
    x, encoder, decoder, bias, residual, y, M, H, W, OH, OW,
    C: tl.constexpr, RANK: tl.constexpr, F: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr,
    SIZE: tl.constexpr, FAR: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pixels pid 0 * BM, output columns pid 1 * BF; one loop over taps and channels, its addresses computed before it.

    x (N, H, W, C), encoder (GROUPS * RANK, KH, KW, C / GROUPS), decoder (F, GROUPS * RANK), y and residual
    (M pixels, F). SIZE: H, W, OH, OW as constants, or (). FAR: a tile's images are more than 2^31 elements apart.
    """
    if len(SIZE) > 0:
        H = SIZE[0]
        W = SIZE[1]
        OH = SIZE[2]
        OW = SIZE[3]
    CG: tl.constexpr = C // GROUPS
    STEPS: tl.constexpr = (CG + BK - 1) // BK
    K: tl.constexpr = KH * KW * CG
    Q: tl.constexpr = GROUPS * RANK
    p0 = tl.program_id(0).to(tl.int64) * BM
    n0 = p0 // (OH * OW)  # one division in 64 bits; what is relative to this image takes 32
    local = (p0 - n0 * OH * OW).to(tl.int32) + tl.arange(0, BM)
    n = local // (OH * OW)
    pixel = local - n * OH * OW
    top = pixel // OW * SH - PH
    left = pixel % OW * SW - PW
    keep = tl.arange(0, BM) < M - p0
    k = tl.arange(0, BK)
    r = tl.arange(0, BR)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    if FAR:
        n = n.to(tl.int64)
    place = (((n * H + top) * W + left) * C)[:, None] + k[None, :]
    xb = x + n0 * H * W * C
    e_place = r[None, :] * K + k[:, None]
    inside_bits = tl.zeros((BM,), dtype=tl.int32)
    if KH * KW < 32:  # one bit a tap, so that a step of the loop costs a shift a row
        for t in tl.static_range(KH * KW):
            h = top + t // KW * DH
            w = left + t % KW * DW
            inside_bits |= (keep & (h >= 0) & (h < H) & (w >= 0) & (w < W)).to(tl.int32) << t
    acc = tl.zeros((BM, BF), dtype=tl.float32)
    for outer in tl.range(0, GROUPS * CHUNKS):
        group = outer // CHUNKS
        r0 = outer % CHUNKS * BR
        eb = encoder + (group * RANK + r0) * K
        hidden = tl.zeros((BM, BR), dtype=tl.float32)
        for i in tl.range(0, KH * KW * STEPS):
            tap = i // STEPS
            c0 = (i - tap * STEPS) * BK
            down = tap // KW * DH
            right = tap % KW * DW
            if KH * KW < 32:
                inside = ((inside_bits >> tap) & 1) != 0
            else:
                inside = keep & (top >= -down) & (top < H - down) & (left >= -right) & (left < W - right)
            x_mask = inside[:, None]
            e_mask = r0 + r[None, :] < RANK
            if CG % BK != 0:
                x_mask = x_mask & (c0 + k[None, :] < CG)
                e_mask = e_mask & (c0 + k[:, None] < CG)
            xt = tl.load(xb + ((down * W + right) * C + group * CG + c0) + place, mask=x_mask, other=0.0)
            et = tl.load(eb + (tap * CG + c0) + e_place, mask=e_mask, other=0.0)
            hidden = tl.dot(xt, et, hidden, input_precision=PRECISION)
        d_place = f[None, :] * Q + (group * RANK + r0 + r)[:, None]
        dt = tl.load(decoder + d_place, mask=(f[None, :] < F) & (r0 + r[:, None] < RANK), other=0.0)
        acc = tl.dot(hidden.to(x.dtype.element_ty), dt, acc, input_precision=PRECISION)
    mask = keep[:, None] & (f[None, :] < F)
    finish(acc, y, bias, residual, p0 + tl.arange(0, BM), f, mask, F, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)


def reduction_tile(channels: int) -> int:
    """Channels of a slice that are read at once: a power of two, 16 to 64, no wider than the slice where that goes."""
    return max(16, min(64, 1 << (channels.bit_length() - 1)))


def taps_tiling(
    pixels: int, channels: int, chunk: int, filters: int, dtype: torch.dtype, wide: bool, heavy: bool
) -> Tiling:
    """Tiles by pixels, channels of a slice, padded ranks of a chunk and filters; after an H200, none spills.

    ``heavy``: the epilogue or the loop over slices takes registers of its own, which more warps have.
    """
    cols, reduction = min(filters, MAX_FILTERS), reduction_tile(channels)
    if dtype == torch.float32:
        cols, reduction = min(cols, 64), min(reduction, 32)
        return Tiling(16, reduction if wide else 16, cols, 8 if cols == 64 or chunk > 32 else 4, 2)
    if not wide:
        return Tiling(64, min(reduction, 32), min(cols, 64), 8, 2)
    rows = 128 if cols <= 128 and pixels >= 2 * 128 * FEW_PROGRAMS else 64
    warps = 8 if chunk == MAX_CHUNK or (cols > 64 and (heavy or rows == 128)) else 4
    return Tiling(rows, reduction, cols, warps, 3 if rows == 128 and chunk <= 32 else 4)


def rows_tiling(pixels: int, channels: int, filters: int, heavy: bool, width: int) -> Tiling:
    """Tiles for rows of taps in half precision; ``width`` is the kernel's."""
    cols, reduction = min(filters, MAX_FILTERS), reduction_tile(channels)
    if pixels < 64 * FEW_PROGRAMS:
        return Tiling(32, reduction, min(cols, 64), 4, 3 if width == 3 else 2)
    if cols > 128 or (heavy and cols > 64 and reduction > 16):  # with 16 channels eight warps spill
        return Tiling(64, reduction, cols, 8, 3)
    return Tiling(64, reduction, cols, 4, 2)


def first_conv2d(key: ConvKey, pixels: int) -> Tiling:
    """What a launch takes where nothing was measured."""
    channels, rank, cols = key.channels // key.groups, key.hidden // key.groups, power_of_two(key.filters)
    heavy = rank > MAX_CHUNK or key.groups > 1 or key.residual or key.activation in ("silu", "gelu")
    most = MAX_ROWS_RANK if key.kernel[1] == 3 else MAX_ROWS_RANK // 2  # as many partial sums
    if can_go_by_rows(key) and channels % reduction_tile(channels) == 0 and rank <= most:
        return rows_tiling(pixels, channels, cols, heavy, key.kernel[1])._replace(by_rows=True)
    chunk = min(power_of_two(rank), MAX_CHUNK if key.wide and key.dtype != torch.float32 else 64)
    return taps_tiling(pixels, channels, chunk, cols, key.dtype, key.wide, heavy)


def plan_conv2d(x: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, residual: Tensor | None, groups: int,
                stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], activation: str | None,
                size: Sequence[int]) -> Launch:  # fmt: skip
    """What fills y (n, f, *size), channels last, from x (n, c, h, w).

    It is called with (x, encoder, decoder, bias, residual, y), of the sizes, types and alignments of these, all of them
    channels last. The decoder is 1 x 1, the encoder takes stride, padding and dilation; the arguments are trusted.
    """
    (n, c, h, w), (filters, q), (oh, ow), kernel = x.shape, decoder.shape[:2], size, encoder.shape[2:]
    rank, pixels = q // groups, n * oh * ow
    wide = multiple_of_16(c // groups, rank, filters, *addresses(x, encoder, decoder))
    chunk = min(power_of_two(rank), MAX_CHUNK)
    constants: dict[str, Any] = {"C": c, "RANK": rank, "F": filters, "GROUPS": groups}
    constants |= {"KH": kernel[0], "KW": kernel[1]}
    constants |= {"PH": padding[0], "DH": dilation[0], "DW": dilation[1], "PRECISION": precision()}
    constants |= {"HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None, "ACTIVATION": activation or ""}
    places = (tuple(stride), tuple(padding), tuple(dilation))
    key = ConvKey(x.dtype, size_class(pixels), c, filters, q, groups, (h, w), tuple(kernel), *places, bias is not None,
                  residual is not None, activation, wide, precision())  # fmt: skip
    t = tuned(x.device, key) or first_conv2d(key, pixels)
    if t.by_rows:
        run, sizes, delivered = conv2d_rows_kernel, tuple[int, ...]((h, w)), t.rows - kernel[1] // 2 * 2 * dilation[1]
    else:
        chunk = chunk if wide and x.dtype != torch.float32 else min(chunk, 64)
        run, sizes, delivered = _conv2d_taps_kernel, (h, w, oh, ow), t.rows
        constants |= {"SH": stride[0], "SW": stride[1], "PW": padding[1]}
    first = _first_sizes.setdefault((key.dtype, *key[2:6], *key[7:]), (h, w)) == (h, w)
    constants |= {"CHUNKS": ceil_div(rank, chunk), "BM": t.rows, "BK": t.reduction, "BR": chunk, "BF": t.cols}
    constants |= {"SIZE": sizes if first else (), "FAR": is_far((t.rows // (oh * ow) + 2) * h * w * c)}
    grid = ceil_div(pixels, delivered), ceil_div(filters, t.cols)
    return Launch(run, grid, (pixels, *sizes), constants, **warps_of(t))
