"""The tilings that are worth measuring for a launch: all that fit, and of these the best by the model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from itertools import product

from ..kernels import ConvKey, DecodeKey, EncodeKey, LaunchKey, LinearKey, Tiling, can_go_by_rows
from .cost import seconds_of
from .rates import Rates, item_size
from .work import padded_tile

MOST_MEASURED = 12  # of a launch
WORTH = 1.5  # times the model's best time: what takes longer by the model is not measured
RANKS_BY_ROWS = 64  # of kernels three wide: four times as many hidden values are held at once


def space(key: LaunchKey) -> Iterator[Tiling]:
    """Every tiling that the kernels take for the launch."""
    half = item_size(key.dtype) == 2
    stages, warps, rows = (2, 3, 4) if half else (2, 3), (4, 8), (32, 64, 128) if half else (16, 32)
    if isinstance(key, LinearKey):
        yield from itertools.starmap(Tiling, product(rows, (32, 64, 128), (32, 64, 128), warps, stages))
    elif isinstance(key, ConvKey) and key.scheme == 3:
        for strips, buffers, n in product((1, 2, 4, 8, 16), (2, 3), (16, 32, 64)):
            if n <= padded_tile(key.filters):
                yield Tiling(64, padded_tile(key.channels), n, 4, buffers, strips)
    elif isinstance(key, ConvKey):
        channels = key.channels // key.groups
        reductions = [k for k in (16, 32, 64, 128) if k <= padded_tile(channels)]
        cols = [n for n in (16, 32, 64, 128, 256) if n <= padded_tile(key.filters)]
        yield from itertools.starmap(Tiling, product(rows, reductions, cols, warps, stages))
        if key.wide and can_go_by_rows(key) and key.hidden // key.groups <= RANKS_BY_ROWS * 3 // key.kernel[1]:
            whole = [k for k in reductions if channels % k == 0]
            for tiling in product(rows, whole, cols, warps, stages):
                yield Tiling(*tiling, by_rows=True)
    elif key.vectors:
        longest = key.channels if isinstance(key, EncodeKey) else max(key.ranks)
        reductions = sorted({min(n, padded_tile(longest)) for n in (256, 512, 1024)})
        for reduction, few, several in product(reductions, (1, 2, 4, 8, 16), (2, 4, 8)):
            yield Tiling(key.rows, reduction, few, several, 1)
    else:
        parts = (1, 2, 4, 8) if isinstance(key, EncodeKey) else (0,)
        for reduction, few, several, n, count in product((32, 64, 128, 256), (16, 32, 64), (2, 4, 8), stages, parts):
            if isinstance(key, DecodeKey) or key.channels >= 2 * reduction * count or count == 1:
                yield Tiling(16, reduction, few, several, n, count)


def launch_candidates(key: LaunchKey, rates: Rates, most: int = MOST_MEASURED) -> list[Tiling]:
    """At most so many within ``WORTH`` times the model's best time, the best first.

    Half of them are the best, the others are spread over the rest: many come to the same by the model.
    """
    times = {t: s for t in space(key) if (s := seconds_of(key, t, rates)) is not None}
    ranked = sorted(times, key=lambda t: times[t])
    near = [t for t in ranked if times[t] <= WORTH * times[ranked[0]]]
    best, rest = near[: most // 2], near[most // 2 :]
    wanted = min(most - len(best), len(rest))
    return best + [rest[i * len(rest) // wanted] for i in range(wanted)]
