"""Tilings, and the keys with which launches ask for them: all that the best tiling depends on."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tiling(NamedTuple):
    """Tile sizes (rows, reduction, output columns) and launch options of a kernel.

    ``parts``: into how many the reduction of an encoder of few rows is split, 0 for as many as fill the device; of a
    walk down images the strips of an image.
    ``by_rows``: a convolution goes through rows of taps.
    """

    rows: int
    reduction: int
    cols: int
    num_warps: int
    num_stages: int
    parts: int = 0
    by_rows: bool = False


MAX_HALO = 4  # pixels on either side that a program by rows of taps computes for its neighbours


class LinearKey(NamedTuple):
    """A fused linear layer of more than 16 rows; ``rows`` is the power of two from the number of rows up."""

    dtype: torch.dtype
    rows: int
    channels: int
    filters: int
    hidden: int
    groups: int
    pivots: bool
    bias: bool
    residual: bool
    activation: str | None
    wide: bool  # sizes and addresses are multiples of 16
    precision: str


class ConvKey(NamedTuple):
    """A fused convolution; ``pixels`` is the power of two from the number of outputs of a channel up."""

    dtype: torch.dtype
    pixels: int
    channels: int
    filters: int
    hidden: int
    groups: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    bias: bool
    residual: bool
    activation: str | None
    wide: bool
    precision: str
    scheme: int = 0  # 3: the kernel, stride, padding and dilation are the decoder's


def can_go_by_rows(key: ConvKey) -> bool:
    """Whether a convolution can go through rows of taps: in half types, of stride 1, 3 or 5 wide, keeping the size."""
    same = all(2 * p == d * (k - 1) for p, d, k in zip(key.padding, key.dilation, key.kernel, strict=True))
    fits = key.wide and same and key.kernel[1] in (3, 5) and key.stride == (1, 1)
    return fits and key.dtype != torch.float32 and key.kernel[1] // 2 * key.dilation[1] <= MAX_HALO


class EncodeKey(NamedTuple):
    """The encoder of up to 16 rows; ``rows`` are 1, 2 or 16, ``vectors``: without matrix units."""

    dtype: torch.dtype
    rows: int
    channels: int  # of a slice
    hidden: int
    groups: int
    vectors: bool
    precision: str
    int8: bool = False  # the factors are integers


class DecodeKey(NamedTuple):
    """The decoders of up to 16 rows of one to three layers."""

    dtype: torch.dtype
    rows: int
    ranks: tuple[int, ...]
    filters: tuple[int, ...]
    vectors: bool
    pivots: bool
    residual: bool
    activation: str | None
    wide: bool
    precision: str
    int8: bool = False


LaunchKey = LinearKey | ConvKey | EncodeKey | DecodeKey
KERNELS: dict[str, type[LaunchKey]] = {
    "linear": LinearKey, "conv2d": ConvKey, "encode_rows": EncodeKey, "decode_rows": DecodeKey,
}  # fmt: skip


class Measured(NamedTuple):
    """The fastest tiling, None for the first guess; microseconds of the call with it and with the guess, its error.

    ``guess_us`` is None where the first guess cannot be launched on the device.
    """

    tiling: Tiling | None
    us: float
    guess_us: float | None
    error: float
