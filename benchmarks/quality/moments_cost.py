"""What collecting moments costs: time against the plain forward passes, memory against the largest moment.

``python -m benchmarks.quality.moments_cost`` writes benchmarks/results/quality/moments_cost.md. Time: medians over
rounds in which plain passes, moments, and moments with gradients take turns on one thread; what is given are ratios
to the plain passes. Memory: growth of the peak resident set while moments are collected, less the moments themselves,
over the size of the largest of them (Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics

import torch
from torch import nn

from alds_fast.criteria import Moments, collect_moments
from alds_fast.layers import find_layers
from alds_fast.measurement import call_model, inference
from benchmarks.common.measure import in_turns, peak_mb
from benchmarks.common.results import RESULTS, described, environment, page, table

from .networks import NETWORKS

OUTPUT = RESULTS / "quality" / "moments_cost.md"


def wide() -> tuple[nn.Module, list[torch.Tensor]]:
    """Two convolutions of 512 filters of 3 x 3, 4608 columns, and 16 batches of 8 images of 14 x 14."""
    convs = (nn.Conv2d(512, 512, 3, padding=1) for _ in range(2))
    return nn.Sequential(*convs).eval(), [torch.randn(8, 512, 14, 14) for _ in range(16)]


def cases(names: list[str]) -> dict[str, tuple[nn.Module, list, str | None]]:
    networks = {"2 x Conv2d(512, 512, 3)": (*wide(), None)}
    for name in names:
        network = NETWORKS[name]
        if network.missing() is None:
            networks[name] = network.build(0), network.calibration(0)[:8], network.include
    return networks


def times(model: nn.Module, batches: list, layers: list, rounds: int) -> dict[str, float]:
    """Median seconds of the plain passes, and of the others the median of the ratios to them."""

    def plain() -> None:
        with inference(model):
            for batch in batches:
                call_model(model, batch)

    sides = {
        "plain": plain,
        "moments": lambda: collect_moments(model, batches, layers),
        "gradients": lambda: collect_moments(model, batches, layers, sensitivity=True),
    }
    seconds = {name: [wall for wall, _ in pairs[1:]] for name, pairs in in_turns(sides, rounds + 1).items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, seconds["plain"], strict=True))
        for name, values in seconds.items()
    }
    return {**ratios, "plain": statistics.median(seconds["plain"])}


def _sizes(moments: dict[str, Moments]) -> list[float]:
    """MB of every moment, shared ones once."""
    tensors = {id(t): t for m in moments.values() for t in (m.second, m.output, m.mean) if t is not None}
    return [t.numel() * 8 / 1e6 for t in tensors.values()]


def memory(model: nn.Module, batches: list, layers: list) -> tuple[float, float]:
    """MB beside the moments at the peak, and MB of the largest moment.

    What has been freed before goes back to the system first: it would be used again without the process growing.
    """
    collect_moments(model, batches[:1], layers)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    kept: list[dict[str, Moments]] = []
    peak = peak_mb(lambda: kept.append(collect_moments(model, batches, layers)))
    sizes = _sizes(kept[0])
    return peak - sum(sizes), max(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["lenet300", "resnet20", "vgg", "vit", "minilm"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, (model, batches, include) in cases(args.only).items():
        layers = [layer for layer in find_layers(model, include) if layer.reason is None]
        beside, largest = memory(model, batches, layers)
        t = times(model, batches, layers, args.rounds)
        ratios = [f"{t['moments']:.1f}x", f"{t['gradients']:.1f}x"]
        rows.append([name, f"{t['plain']:.2f}", *ratios, f"{beside:.0f}", f"{largest:.1f}"])
        print(*rows[-1], sep=", ", flush=True)
    passes = ["plain passes, s", "with moments", "with gradients too"]
    head = f"{described(environment())}; `python -m benchmarks.quality.moments_cost`."
    costs = table(["network", *passes, "memory beside the moments, MB", "largest"], rows)
    OUTPUT.write_text(page("# What collecting moments costs", head, costs))


if __name__ == "__main__":
    main()
