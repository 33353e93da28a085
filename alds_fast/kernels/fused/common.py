"""What the kernels share: sizes of tiles and the epilogue. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..tilings import Tiling


def ceil_div(n: int, size: int) -> int:
    """How many tiles of a size n takes; triton.cdiv, which kernels share, is 4 us of a host.

    >>> ceil_div(17, 8)
    3
    """
    return -(-n // size)


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least ``n`` and ``least``.

    >>> power_of_two(3), power_of_two(16), power_of_two(17)
    (16, 16, 32)
    """
    return max(least, 1 << (n - 1).bit_length())


def addresses(*tensors: Tensor) -> list[int]:
    """Where the tensors begin, in bytes: Triton reads in wide pieces from multiples of 16 only."""
    return [t.data_ptr() for t in tensors]


def is_far(elements: int) -> bool:
    """Whether places so many elements apart need 64 bits."""
    return elements >= 1 << 31


def size_class(n: int) -> int:
    """The power of two from ``n`` up: launches of one class share a tuned tiling.

    >>> size_class(1), size_class(17)
    (1, 32)
    """
    return 1 << (n - 1).bit_length()


def warps_of(t: Tiling) -> dict[str, int]:
    """What Triton's compiler is told of a tiling."""
    return {"num_warps": t.num_warps, "num_stages": t.num_stages}


def multiple_of_16(*sizes: int) -> bool:
    """Whether runs of these lengths can be read in wide pieces; else fewer rows a program keep it from spilling."""
    return all(n % 16 == 0 for n in sizes)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """ReLU, SiLU or GELU (with erf) of a float32 tile; ACTIVATION "" leaves it as it is.

    Unless EXACT, GELU takes erfc from Abramowitz and Stegun 7.1.26, off by at most 1.5e-7: z * erfc(-z / sqrt 2) / 2 in
    a third of the instructions of libdevice's erf, with 1 / t as the square of the hardware's reciprocal root.
    """
    if ACTIVATION == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    elif ACTIVATION == "gelu":
        if EXACT:
            z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
        else:
            a = tl.abs(z) * 0.7071067811865476
            root = tl.rsqrt(1.0 + 0.3275911 * a)
            t = root * root
            p = ((((1.061405429 * t - 1.453152027) * t) + 1.421413741) * t - 0.284496736) * t + 0.254829592
            half = 0.5 * p * t * tl.exp(-a * a)
            z = z * tl.where(z < 0, half, 1.0 - half)
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
    WHOLE: tl.constexpr = False,
):
    """y[rows, cols] = activation(acc + bias + residual) for row-major y and residual of F columns.

    WHOLE: no element of the tile is masked.
    """
    if HAS_BIAS:
        b = tl.load(bias + cols) if WHOLE else tl.load(bias + cols, mask=cols < F, other=0.0)
        acc += b.to(tl.float32)[None, :]
    place = rows[:, None] * F + cols[None, :]
    if HAS_RESIDUAL:
        if WHOLE:
            acc += tl.load(residual + place).to(tl.float32)
        else:
            acc += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    exact: tl.constexpr = y.dtype.element_ty == tl.float32
    z = activate(acc, ACTIVATION, exact).to(y.dtype.element_ty)
    if WHOLE:
        tl.store(y + place, z)
    else:
        tl.store(y + place, z, mask=mask)


def split(channels: int, tiles: int, reduction: int, parts: int = 0) -> tuple[int, int]:
    """(parts, channels of each): enough parts for some 256 programs, at most 8, each a multiple of ``reduction``.

    Or about as many as are asked for.
    """
    wanted = max(1, min(8, 256 // max(1, tiles), channels // (2 * reduction)))
    parts = parts or 1 << (wanted.bit_length() - 1)
    per_part = ceil_div(channels, parts * reduction) * reduction
    return ceil_div(channels, per_part), per_part
