"""What the tuner's model of a launch's time says of some layers, for the first GPU run to be compared with.

Writes benchmarks/results/predicted.json and predicted.md: per layer microseconds of the first guess and of the tiling
that is the best by the model, on an H100 and an A100. Nothing runs.
"""

from __future__ import annotations

import torch

from alds_fast.kernels import ConvKey, DecodeKey, EncodeKey, LaunchKey, LinearKey, Tiling
from alds_fast.tuning import A100, H100, Rates, launch_candidates, seconds_of
from benchmarks.common.results import environment, page, table, write

from .launches import first_guess

DEVICES = {"H100": H100, "A100": A100}
HALF = torch.bfloat16
PLAIN = False, False, None, True, "ieee"  # no bias, no residual, no activation; sizes are multiples of 16
SAME = (3, 3), (1, 1), (1, 1), (1, 1)


def convolution(batch: int, side: int, channels: int, hidden: int, groups: int = 1) -> list[LaunchKey]:
    """3 x 3, stride 1, as many filters as channels."""
    pixels = batch * side**2
    return [ConvKey(HALF, pixels, channels, channels, hidden, groups, (side, side), *SAME, *PLAIN)]


def linear(rows: int, channels: int, filters: int, hidden: int, activation: str | None = None) -> list[LaunchKey]:
    """A layer of many rows."""
    return [LinearKey(HALF, rows, channels, filters, hidden, 1, False, False, False, activation, True, "ieee")]


def few(rows: int, channels: int, filters: int, hidden: int, layers: int = 1) -> list[LaunchKey]:
    """Layers of up to 16 rows, which read the same input."""
    vectors = rows < 3
    padded = rows if vectors else 16
    encode = EncodeKey(HALF, padded, channels, hidden * layers, 1, vectors, "ieee")
    decode = DecodeKey(HALF, padded, (hidden,) * layers, (filters,) * layers, vectors, False, False, None, True, "ieee")
    return [encode, decode]


ROWS: dict[str, list[LaunchKey]] = {
    "3x3 64 -> 64, 56 x 56, q 16, batch 32": convolution(32, 56, 64, 16),
    "q 16, batch 128": convolution(128, 56, 64, 16),
    "q 32, batch 32": convolution(32, 56, 64, 32),
    "q 32, batch 128": convolution(128, 56, 64, 32),
    "3x3 128 -> 128, 28 x 28, q 32, batch 128": convolution(128, 28, 128, 32),
    "q 64": convolution(128, 28, 128, 64),
    "3x3 256 -> 256, 14 x 14, q 64, batch 128": convolution(128, 14, 256, 64),
    "3x3 512 -> 512, 7 x 7, q 128, batch 128": convolution(128, 7, 512, 128),
    "linear 768 -> 3072, 25,216 rows, q 128, GELU": linear(25216, 768, 3072, 128, "gelu"),
    "no activation": linear(25216, 768, 3072, 128),
    "3072 -> 768": linear(25216, 3072, 768, 128),
    "1x1 256 -> 1024, 14 x 14, q 64, batch 128": linear(25088, 256, 1024, 64),
    "linear 4096 -> 4096, 2,048 rows, q 256": linear(2048, 4096, 4096, 256),
    "linear 4096 -> 4096, 1 row, q 1024": few(1, 4096, 4096, 1024),
    "4 rows": few(4, 4096, 4096, 1024),
    "16 rows": few(16, 4096, 4096, 1024),
    "linear 4096 -> 11008, 1 row, q 1024": few(1, 4096, 11008, 1024),
    "q/k/v 4096, 1 row, q 1024": few(1, 4096, 4096, 1024, 3),
    "q/k/v 4096, 16 rows, q 512": few(16, 4096, 4096, 512, 3),
}


def microseconds(keys: list[LaunchKey], tilings: list[Tiling], rates: Rates) -> float:
    """Of the launches one after another; an encoder and a decoder of few rows overlap by a launch."""
    times = [seconds_of(key, t, rates) for key, t in zip(keys, tilings, strict=True)]
    return 1e6 * (sum(s if s is not None else float("nan") for s in times) - (len(times) - 1) * rates.launch)


def predictions() -> list[dict]:
    """One row a layer."""
    rows = []
    for name, keys in ROWS.items():
        row: dict = {"layer": name}
        for device, rates in DEVICES.items():
            guess, best = [first_guess(key) for key in keys], [launch_candidates(key, rates)[0] for key in keys]
            row[device] = {
                "guess_us": microseconds(keys, guess, rates), "best_us": microseconds(keys, best, rates),
                "guess": [t._asdict() for t in guess], "best": [t._asdict() for t in best],
            }  # fmt: skip
        rows.append(row)
    return rows


def main() -> None:
    rows, about = predictions(), environment()
    headers = ["layer", *(f"{device}: {what}" for device in DEVICES for what in ("first guess", "best by the model"))]
    lines = [[row["layer"], *(f"{row[d][k]:.1f}" for d in DEVICES for k in ("guess_us", "best_us"))] for row in rows]
    said = "Microseconds in a CUDA graph by the tuner's model, bfloat16, no bias. Nothing was measured."
    write("predicted", {"environment": about, "rows": rows}, page(said, table(headers, lines)))


if __name__ == "__main__":
    main()
