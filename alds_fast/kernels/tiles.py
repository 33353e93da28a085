"""Triton building blocks that the kernels share. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """ReLU, SiLU or GELU (with erf) of a float32 tile; ACTIVATION "" leaves it as it is."""
    if ACTIVATION == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    return z


@triton.jit
def finish(
    acc,
    y,
    bias,
    residual,
    rows,
    cols,
    mask,
    F,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """y[rows, cols] = activation(acc + bias + residual) for row-major y and residual of F columns; rows are int64."""
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=cols < F, other=0.0).to(tl.float32)[None, :]
    place = rows[:, None] * F + cols[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, activate(acc, ACTIVATION).to(y.dtype.element_ty), mask=mask)
