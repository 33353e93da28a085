"""What a launch does with a tiling, counted: programs, loops, bytes and products, and what a program takes on chip.

All that the model of its time and the limits of the device are asked of.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from ..kernels import ConvKey, DecodeKey, EncodeKey, LaunchKey, LinearKey, Tiling
from .rates import item_size


@dataclass(frozen=True)
class Loop:
    """A loop of a program around one product: of ``rows`` x ``reduction`` with ``reduction`` x ``cols`` values.

    ``on_chip``: the first ones are there already. ``buffers`` of shared memory that the values are read into, 0 for
    registers, None for as many as the launch has stages.
    """

    times: int
    rows: int
    reduction: int
    cols: int
    on_chip: bool = False
    buffers: int | None = None

    @property
    def values(self) -> int:
        """That one turn reads."""
        return (self.cols + (0 if self.on_chip else self.rows)) * self.reduction

    @property
    def products(self) -> int:
        """Of one turn."""
        return self.rows * self.reduction * self.cols


@dataclass(frozen=True)
class LaunchWork:
    """Of a launch: its programs and their loops, values held in registers by a program, bytes from the L2 and memory.

    ``fixed`` are a program's instructions outside of its loops, per warp; ``size`` are the bytes of a value. ``kept``:
    values of factors that every warp has in registers below compute capability 9.0.
    """

    programs: int
    loops: tuple[Loop, ...]
    held: int
    l2_bytes: float
    memory_bytes: float
    fixed: int
    size: int
    kept: int = 0

    def shared_bytes(self, buffers: int) -> int:
        """That a program takes: the buffers of its largest loop."""
        turns = [loop.values * (buffers if loop.buffers is None else loop.buffers) for loop in self.loops]
        there = [loop.on_chip * loop.rows * loop.reduction for loop in self.loops]
        return max(map(sum, zip(turns, there, strict=True))) * self.size


def padded_tile(n: int) -> int:
    """The power of two from n up, at least 16: the least that the matrix units take."""
    return max(16, 1 << (n - 1).bit_length())


def work_of(key: LaunchKey, t: Tiling) -> LaunchWork:
    """What the launch does with that tiling."""
    if isinstance(key, LinearKey):
        return _linear(key, t)
    if isinstance(key, ConvKey):
        return _walk(key, t) if key.scheme == 3 else _conv2d(key, t)
    return _encode_rows(key, t) if isinstance(key, EncodeKey) else _decode_rows(key, t)


def _linear(key: LinearKey, t: Tiling) -> LaunchWork:
    size, hidden = item_size(key.dtype), padded_tile(key.hidden)
    row_tiles, col_tiles = ceil(key.rows / t.rows), ceil(key.filters / t.cols)
    splits = max(1, min(col_tiles, 128 // row_tiles))
    each = ceil(col_tiles / splits)
    programs = row_tiles * ceil(col_tiles / each)
    encode, decode = (
        Loop(ceil(key.channels / t.reduction), t.rows, t.reduction, hidden),
        Loop(each, t.rows, hidden, t.cols, True),
    )
    read = t.rows * key.channels + 0.6 * hidden * (key.channels + each * t.cols)  # programs read the same factors
    outputs = key.rows * key.filters * (1 + key.residual)
    factors = key.hidden * (key.channels // key.groups + key.filters)
    return LaunchWork(programs, (encode, decode), t.rows * (hidden + t.cols), size * (programs * read + outputs),
                size * (key.rows * key.channels + outputs + factors), 500, size)  # fmt: skip


def _conv2d(key: ConvKey, t: Tiling) -> LaunchWork:
    size, rank, taps = item_size(key.dtype), key.hidden // key.groups, prod(key.kernel)
    chunk, channels = min(padded_tile(rank), 128 if key.wide and size == 2 else 64), key.channels // key.groups
    slices = key.groups * ceil(rank / chunk)
    turns = slices * ceil(channels / t.reduction) * (key.kernel[0] if t.by_rows else taps)
    width = (4 if key.kernel[1] == 3 else 8) * chunk if t.by_rows else chunk
    delivered = t.rows - key.kernel[1] // 2 * 2 * key.dilation[1] if t.by_rows else t.rows
    programs = ceil(key.pixels / delivered) * ceil(key.filters / t.cols)
    encode, decode = Loop(turns, t.rows, t.reduction, width), Loop(slices, t.rows, chunk, t.cols, True, 1)
    read = turns * (t.rows * t.reduction + 0.6 * t.reduction * width) + 0.6 * key.hidden * t.cols
    inputs = key.pixels * prod(key.stride) * key.channels
    outputs = key.pixels * key.filters * (1 + key.residual)
    factors = key.hidden * (taps * channels + key.filters)
    held = t.rows * (max(width, t.cols) if slices == 1 else width + t.cols)
    l2, memory = programs * read + outputs, inputs + outputs + factors
    return LaunchWork(programs, (encode, decode), held, size * l2, size * memory, 920, size)


def _walk(key: ConvKey, t: Tiling) -> LaunchWork:
    """Down images whose rows take a power of two columns of a tile; two rows more than a strip has are read."""
    (height, width), size = key.size, item_size(key.dtype)
    each, rows, decoder = t.rows // (1 << (width - 1).bit_length()), ceil(height / t.parts), 9 * key.hidden
    programs = ceil(key.pixels / (height * width * each)) * t.parts * ceil(key.filters / t.cols)
    encode, decode = Loop(rows + 2, t.rows, t.reduction, key.hidden), Loop(rows + 1, t.rows, decoder, t.cols, True, 1)
    factors = key.hidden * key.channels
    read = (rows + 2) * each * width * key.channels + 0.6 * (factors + decoder * t.cols)
    outputs = key.pixels * key.filters * (1 + key.residual)
    memory = key.pixels * key.channels + outputs + factors + decoder * key.filters
    return LaunchWork(programs, (encode, decode), 3 * t.rows * t.cols, size * (programs * read + outputs),
                      size * memory, 400, size, decoder * t.cols)  # fmt: skip


def _encode_rows(key: EncodeKey, t: Tiling) -> LaunchWork:
    size, rank = item_size(key.dtype), key.hidden // key.groups
    tiles = ceil(rank / t.cols) * key.groups
    parts = 1 if key.vectors else t.parts or max(1, min(8, 256 // tiles, key.channels // (2 * t.reduction)))
    turns = ceil(key.channels / parts / t.reduction)
    weights = (1 if key.int8 else size) * key.hidden * key.channels
    added = 4 * parts * key.hidden * key.rows * (parts > 1)
    inputs = size * tiles * key.rows * key.channels
    held = t.cols * turns * t.reduction // 2 if key.vectors else t.cols * t.rows
    loop = Loop(turns, t.rows, t.reduction, t.cols, buffers=0 if key.vectors else None)
    return LaunchWork(parts * tiles, (loop,), held, weights + inputs + 2 * added, weights, 210, size)


def _decode_rows(key: DecodeKey, t: Tiling) -> LaunchWork:
    size, programs = item_size(key.dtype), sum(ceil(f / t.cols) for f in key.filters)
    weights = (1 if key.int8 else size) * sum(f * r for f, r in zip(key.filters, key.ranks, strict=True))
    hidden, outputs = size * programs * key.rows * max(key.ranks), size * key.rows * sum(key.filters)
    turns = ceil(max(key.ranks) / t.reduction)
    held = t.cols * turns * t.reduction // 2 if key.vectors else t.cols * t.rows
    loop = Loop(turns, t.rows, t.reduction, t.cols, buffers=0 if key.vectors else None)
    return LaunchWork(programs, (loop,), held, weights + hidden + outputs, weights + outputs, 217, size)
