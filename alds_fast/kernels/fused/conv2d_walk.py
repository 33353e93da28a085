"""Fused low-rank convolutions of scheme 3 in Triton: a 1 x 1 encoder, then a 3 x 3 decoder of stride 1.

One launch: a program walks down a strip of one image, or of several narrow ones side by side. It computes the hidden
values of every row once, shifts them by a pixel to either side, and adds what they give to the sums of the three rows
of outputs that they are part of. Rows of images are padded with columns of zeros to a power of two. The factors stay on
chip. Accumulates in float32 and rounds the hidden values to the type of x, as two library calls do.

The first size of images that a layer sees is a constant of its kernel, as in :mod:`alds_fast.kernels.fused.conv2d`.
Importing this needs triton.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..limits import TILE, precision
from ..tilings import ConvKey, Tiling, capability_of, tuned
from .common import addresses, ceil_div, finish, is_far, multiple_of_16, power_of_two, size_class, warps_of
from .launching import Launch

PROGRAMS = 512  # as many strips as give about so many: four a multiprocessor of an H100
LEAST_ROWS = 4  # of a strip: two more are read than it delivers
MOST_PARTS = 16  # strips of an image
_first_seen: dict[tuple, tuple[int, int]] = {}  # sizes of images, by the key but for sizes: constants of its kernel


@triton.jit
def _sides(z, i, w, W, BM: tl.constexpr, BQ: tl.constexpr, FULL: tl.constexpr):
    """The hidden values z (BM, BQ) of every pixel's left neighbour and of its right one, 0 beyond the image.

    Columns of zeros part the images of a tile; FULL: there are none.
    """
    left = tl.gather(z, tl.broadcast_to(((i + BM - 1) % BM)[:, None], (BM, BQ)), 0)
    right = tl.gather(z, tl.broadcast_to(((i + 1) % BM)[:, None], (BM, BQ)), 0)
    if FULL:
        left = tl.where((w > 0)[:, None], left, 0.0)
        right = tl.where((w < W - 1)[:, None], right, 0.0)
    return left, right


@triton.jit
def conv2d_walk_kernel(
    x, encoder, decoder, bias, residual, y, M, H, W,
    C: tl.constexpr, F: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr,
    BF: tl.constexpr, BW: tl.constexpr, SIZE: tl.constexpr, FULL: tl.constexpr, FAR: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Strip pid 0 % PARTS of BM / BW images, output columns pid 1 * BF.

    x (M images, H, W, C), encoder (BQ, C), decoder (F, 3, 3, BQ), y and residual (M, H, W, F). A row of an image takes
    BW columns of the tile; FULL: W is as many. SIZE: (H, W) as constants, or (). FAR: a tile's images are more than
    2^31 elements apart.
    """
    if len(SIZE) > 0:
        H = SIZE[0]
        W = SIZE[1]
    rows = (H + PARTS - 1) // PARTS
    n0 = (tl.program_id(0) // PARTS).to(tl.int64) * (BM // BW)
    h0 = tl.program_id(0) % PARTS * rows
    i = tl.arange(0, BM)
    n = i // BW
    w = i % BW
    top = h0 + tl.zeros((BM,), dtype=tl.int32)
    keep = (w < W) & (n < M - n0)
    k = tl.arange(0, BK)
    r = tl.arange(0, BQ)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    if FAR:
        n = n.to(tl.int64)
    pixel = n * (H * W) + w
    xb = x + n0 * (H * W * C)
    yb = y + n0 * (H * W * F)
    rb = residual + n0 * (H * W * F) if HAS_RESIDUAL else None
    at = (pixel * C)[:, None] + k[None, :]
    wide = (k < C)[None, :]
    e = tl.load(encoder + r[None, :] * C + k[:, None], mask=(k < C)[:, None], other=0.0)
    d = decoder + (f[None, :] * (9 * BQ) + r[:, None])
    m = (f < F)[None, :]
    d00 = tl.load(d, mask=m, other=0.0)
    d01 = tl.load(d + BQ, mask=m, other=0.0)
    d02 = tl.load(d + 2 * BQ, mask=m, other=0.0)
    d10 = tl.load(d + 3 * BQ, mask=m, other=0.0)
    d11 = tl.load(d + 4 * BQ, mask=m, other=0.0)
    d12 = tl.load(d + 5 * BQ, mask=m, other=0.0)
    d20 = tl.load(d + 6 * BQ, mask=m, other=0.0)
    d21 = tl.load(d + 7 * BQ, mask=m, other=0.0)
    d22 = tl.load(d + 8 * BQ, mask=m, other=0.0)
    if HAS_BIAS:
        b = tl.load(bias + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    # of the row above the strip and of its first one
    xt = tl.load(xb + (h0 - 1) * (W * C) + at, mask=(keep & (top > 0) & (top <= H))[:, None] & wide, other=0.0)
    z = tl.dot(xt, e).to(x.dtype.element_ty)
    left, right = _sides(z, i, w, W, BM, BQ, FULL)
    second = tl.dot(right, d02, tl.dot(z, d01, tl.dot(left, d00)))
    xt = tl.load(xb + h0 * (W * C) + at, mask=(keep & (top < H))[:, None] & wide, other=0.0)
    z = tl.dot(xt, e).to(x.dtype.element_ty)
    left, right = _sides(z, i, w, W, BM, BQ, FULL)
    first = tl.dot(right, d12, tl.dot(z, d11, tl.dot(left, d10, second)))
    second = tl.dot(right, d02, tl.dot(z, d01, tl.dot(left, d00)))
    for s in tl.range(0, rows):
        x_mask = (keep & (top + (s + 1) < H))[:, None] & wide
        xt = tl.load(xb + (h0 + s + 1) * (W * C) + at, mask=x_mask, other=0.0)
        z = tl.dot(xt, e).to(x.dtype.element_ty)
        left, right = _sides(z, i, w, W, BM, BQ, FULL)
        done = tl.dot(right, d22, tl.dot(z, d21, tl.dot(left, d20, first)))
        first = tl.dot(right, d12, tl.dot(z, d11, tl.dot(left, d10, second)))
        second = tl.dot(right, d02, tl.dot(z, d01, tl.dot(left, d00)))
        if HAS_BIAS:
            done += b
        y_mask = (keep & (top + s < H))[:, None] & m
        at_row = pixel + (h0 + s) * W
        finish(done, yb, bias, rb, at_row, f, y_mask, F, False, HAS_RESIDUAL, ACTIVATION)


def has_wgmma(x: Tensor) -> bool:
    """Whether products take factors out of shared memory (compute capability 9.0 to 11).

    Else every warp has all columns of the decoder in registers, of which half as many fit unless there are few ranks.
    """
    return (9, 0) <= (capability_of(x.device) or (0, 0)) < (12, 0)


def columns(width: int) -> int:
    """Of a tile, for a row of an image: a power of two."""
    return power_of_two(width, 1)


def walk_tiling(channels: int, cols: int, parts: int) -> Tiling:
    """With so many output columns of a program and strips of an image."""
    return Tiling(TILE, power_of_two(channels), cols, 4, 2, parts)


def first_walk(key: ConvKey, pixels: int, wgmma: bool) -> Tiling:
    """What a launch takes where nothing was measured; none spills."""
    light = key.hidden == 16 and not key.residual and key.activation not in ("silu", "gelu")
    most = (64 if wgmma or light else 32) // (1 if key.wide else 2)
    (height, width), cols = key.size, min(power_of_two(key.filters), most)
    tiles = ceil_div(pixels // (height * width), TILE // columns(width)) * ceil_div(key.filters, cols)
    parts = max(1, min(MOST_PARTS, ceil_div(PROGRAMS, tiles), height // LEAST_ROWS))
    return walk_tiling(key.channels, cols, parts)


def plan_conv2d_walk(x: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, residual: Tensor | None,
                     activation: str | None) -> Launch:  # fmt: skip
    """What fills y (n, f, h, w), channels last, from x (n, c, h, w).

    It is called with (x, encoder, decoder, bias, residual, y), of the sizes, types and alignments of these, all of them
    channels last. The layer is one that :func:`alds_fast.kernels.limits.why_no_walk` has nothing against.
    """
    (n, c, h, w), (filters, q) = x.shape, decoder.shape[:2]
    ones, wide = (1, 1), multiple_of_16(*addresses(x, encoder, decoder))
    key = ConvKey(x.dtype, size_class(n * h * w), c, filters, q, 1, (h, w), (3, 3), ones, ones, ones, bias is not None,
                  residual is not None, activation, wide, precision(), scheme=3)  # fmt: skip
    t = tuned(x.device, key) or first_walk(key, n * h * w, has_wgmma(x))
    each = t.rows // columns(w)
    first = _first_seen.setdefault((key.dtype, *key[2:6], *key[7:]), (h, w)) == (h, w)
    constants: dict[str, Any] = {"C": c, "F": filters, "PARTS": t.parts, "BM": t.rows, "BK": t.reduction, "BQ": q}
    constants |= {"BF": t.cols, "BW": columns(w), "SIZE": (h, w) if first else (), "FULL": columns(w) == w}
    constants |= {"FAR": is_far(each * h * w * max(c, filters)), "HAS_BIAS": bias is not None}
    constants |= {"HAS_RESIDUAL": residual is not None, "ACTIVATION": activation or ""}
    grid = ceil_div(n, each) * t.parts, ceil_div(filters, t.cols)
    return Launch(conv2d_walk_kernel, grid, (n, h, w), constants, **warps_of(t))
