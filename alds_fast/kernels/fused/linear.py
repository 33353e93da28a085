"""Fused low-rank linear layers in Triton: y = activation(decoder @ blockdiag(encoder) @ x + bias + residual).

One launch: a program computes the hidden values of its rows once, keeps them on chip and multiplies them with the
whole decoder, so that groups * rank numbers a row are neither written to memory nor read back. With output pivots the
hidden values are outputs, which are stored in their place, and the decoder has the other rows only. Up to 16 rows go to
:mod:`alds_fast.kernels.fused.few_rows` instead.

Accumulates in float32, rounds the hidden values to the type of x, as two library calls do, and uses float32 products
("ieee", no tf32) unless torch's float32 matmul precision asks for less. Importing this needs triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..limits import MAX_ROWS, precision
from ..tilings import LinearKey, Tiling, tuned
from .common import addresses, ceil_div, finish, is_far, multiple_of_16, power_of_two, size_class, warps_of
from .few_rows import plan_few_rows
from .launching import Launch


@triton.jit
def _lowrank_linear_kernel(
    x, encoder, decoder, bias, residual, outputs, y, M, stride_x, cols_per_program,
    C: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BQ: tl.constexpr, BF: tl.constexpr,
    PIVOTS: tl.constexpr, WHOLE: tl.constexpr, FAR: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows pid 0 * BM, rows of the decoder pid 1 * cols_per_program; BQ >= Q hidden values stay on chip.

    With PIVOTS outputs (Q + ROWS,) says which column of y a hidden value, and then a row of the decoder, is.
    The block-diagonal encoder is read as a full one: of the BQ x BK tile only what lies in a block is loaded.
    WHOLE: M is a multiple of BM. FAR: the rows of a tile are more than 2^31 elements apart.
    """
    F: tl.constexpr = ROWS + Q if PIVOTS else ROWS
    CG: tl.constexpr = C // GROUPS
    whole_steps: tl.constexpr = C % BK == 0
    whole_decoder: tl.constexpr = ROWS % BF == 0 and Q == BQ
    p0 = tl.program_id(0).to(tl.int64) * BM
    i = tl.arange(0, BM)
    keep = i < M - p0
    if FAR:
        i = i.to(tl.int64)
    q = tl.arange(0, BQ)
    k = tl.arange(0, BK)
    xt_place = (x + p0 * stride_x) + i[:, None] * stride_x + k[None, :]
    et_place = encoder + q[None, :] * CG + k[:, None]
    first = q // (Q // GROUPS) * CG  # first channel of the hidden value's slice
    hidden = tl.zeros((BM, BQ), dtype=tl.float32)
    for k0 in range(0, C, BK):
        if whole_steps and WHOLE:
            xt = tl.load(xt_place + k0)
        elif whole_steps:
            xt = tl.load(xt_place + k0, mask=keep[:, None], other=0.0)
        else:
            xt = tl.load(xt_place + k0, mask=keep[:, None] & (k0 + k[None, :] < C), other=0.0)
        if GROUPS > 1:
            local = k0 + k[:, None] - first[None, :]
            inside = (local >= 0) & (local < CG) & (q[None, :] < Q)
            et = tl.load(encoder + q[None, :] * CG + local, mask=inside, other=0.0)
        elif whole_steps and Q == BQ:
            et = tl.load(et_place + k0)
        elif whole_steps:  # a mask that is uniform along runs of channels keeps the loads wide
            et = tl.load(et_place + k0, mask=q[None, :] < Q, other=0.0)
        else:
            et = tl.load(et_place + k0, mask=(k0 + k[:, None] < C) & (q[None, :] < Q), other=0.0)
        hidden = tl.dot(xt, et, hidden, input_precision=PRECISION)
    h = hidden.to(x.dtype.element_ty)
    y += p0 * F
    if HAS_RESIDUAL:
        residual += p0 * F
    start = tl.program_id(1) * cols_per_program
    if PIVOTS:
        is_pivot = q < Q
        if start == 0:
            column = tl.load(outputs + q, mask=is_pivot, other=F)
            mask = keep[:, None] & (column[None, :] < F)
            finish(h.to(tl.float32), y, bias, residual, i, column, mask, F, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)
    for f0 in range(start, tl.minimum(start + cols_per_program, ROWS), BF):
        f = f0 + tl.arange(0, BF)
        dt_place = decoder + f[None, :] * Q + q[:, None]
        if whole_decoder:
            dt = tl.load(dt_place)
        else:
            dt = tl.load(dt_place, mask=(f[None, :] < ROWS) & (q[:, None] < Q), other=0.0)
        acc = tl.dot(h, dt, input_precision=PRECISION)
        column = f
        if PIVOTS:
            column = tl.load(outputs + Q + f, mask=f < ROWS, other=F)
        mask = keep[:, None] & (column[None, :] < F)
        finish(acc, y, bias, residual, i, column, mask, F, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
               WHOLE and ROWS % BF == 0)  # fmt: skip


def tile_tiling(hidden: int, dtype: torch.dtype, wide: bool, heavy: bool, pivots: bool = False) -> Tiling:
    """Tiles by the padded number of hidden values; on an H200 64 rows by 4 warps were fastest, and none spills.

    With pivots every column has an address of its own, so that a thread has fewer of them; not measured on a GPU.
    """
    if pivots and dtype == torch.float32:
        return Tiling(32, 32, 32, 8, 2) if hidden <= 64 else Tiling(16, 32, 32, 8, 2)
    if pivots and wide:
        return Tiling(64, 64, 64, 8, 3) if hidden <= 64 else Tiling(32, 64, 64, 8, 3)
    if dtype == torch.float32:
        return Tiling(32, 32, 32, 4 if wide and hidden <= 64 else 8, 2) if hidden <= 128 else Tiling(16, 32, 32, 8, 2)
    if wide:
        return Tiling(64, 64, 64, 4, 3) if hidden <= 128 else Tiling(64, 64, 64, 8 if heavy else 4, 4)
    if pivots and hidden > 128:
        return Tiling(16, 32, 32, 8, 2)
    return Tiling(64, 32, 64, 8, 2) if hidden <= 64 else Tiling(32, 32, 32, 8, 2)


def first_linear(key: LinearKey) -> Tiling:
    """What a launch takes where nothing was measured."""
    heavy = key.groups > 1 or key.residual or key.activation in ("silu", "gelu")
    return tile_tiling(power_of_two(key.hidden), key.dtype, key.wide, heavy, key.pivots)


def _plan_tile(x: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, residual: Tensor | None, groups: int,
               activation: str | None, outputs: Tensor | None) -> Launch:  # fmt: skip
    (m, c), (f, q), stride = x.shape, decoder.shape, x.stride(0)
    wide = multiple_of_16(c // groups, q // groups, f, stride, *addresses(x, encoder, decoder))
    exact, flags = precision(), (outputs is not None, bias is not None, residual is not None)
    key = LinearKey(x.dtype, size_class(m), c, f, q, groups, *flags, activation, wide, exact)
    t = tuned(x.device, key) or first_linear(key)
    row_tiles, col_tiles = ceil_div(m, t.rows), ceil_div(f, t.cols)
    splits = max(1, min(col_tiles, 128 // row_tiles))  # few rows: several programs recompute one hidden tile
    per_program = ceil_div(col_tiles, splits) * t.cols
    constants = {
        "C": c, "Q": q, "ROWS": f, "GROUPS": groups, "BM": t.rows, "BK": t.reduction, "BQ": power_of_two(q),
        "BF": t.cols, "PIVOTS": outputs is not None, "WHOLE": m % t.rows == 0,
        "FAR": is_far(t.rows * max(stride, f + q)), "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None,
        "ACTIVATION": activation or "", "PRECISION": exact,
    }  # fmt: skip
    grid = row_tiles, ceil_div(f, per_program)
    return Launch(_lowrank_linear_kernel, grid, (m, stride, per_program), constants, **warps_of(t))


def plan_linear(x: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, residual: Tensor | None, groups: int,
                activation: str | None, outputs: Tensor | None,
                scales: Sequence[Tensor] = ()) -> Callable[..., None]:  # fmt: skip
    """What fills y (m, f) from x (m, c), all of one type and device.

    It is called with (x, encoder, decoder, bias, residual, outputs, scales, y), of the sizes, types, strides and
    alignments of these. ``outputs`` (f,) int32 says which of y's columns the hidden values, and then the rows of a
    decoder (f - rank, rank), are; None without pivots. ``scales`` of int8 factors are those of the encoder's and of the
    decoder's rows, for up to 16 rows of x. All are contiguous but x, which has unit stride along its channels; the
    arguments are trusted.
    """
    options = residual, groups, activation, outputs
    if x.shape[0] <= MAX_ROWS:
        rows = plan_few_rows(x, encoder, [decoder], [bias], *options, scales)

        def run_rows(x: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, residual: Tensor | None,
                     outputs: Tensor | None, scales: Sequence[Tensor], y: Tensor) -> None:  # fmt: skip
            rows(x, encoder, (decoder,), (bias,), residual, outputs, scales, (y,))

        return run_rows
    launch = _plan_tile(x, encoder, decoder, bias, *options)

    def run_tiles(x: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, residual: Tensor | None,
                  outputs: Tensor | None, scales: Sequence[Tensor], y: Tensor) -> None:  # fmt: skip
        launch(x, encoder, decoder, bias, residual, outputs, y)

    return run_tiles
