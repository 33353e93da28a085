"""Train the networks of the suite that no package ships: python -m benchmarks.quality.train [--only NAME] [--seeds 3].

What is in the cache already is not trained again; an interrupted network starts anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from benchmarks.common.results import table

from .data import cache
from .networks import NETWORKS
from .training import weights_file


def main() -> None:
    """Seed by seed, so that every network is there once before any is there twice."""
    names = [name for name, network in NETWORKS.items() if network.trained_here]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=names, help="one network; may be given several times")
    parser.add_argument("--seeds", type=int, default=3, help="how many of each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(options.seeds):
        for name in options.only or names:
            reason = NETWORKS[name].missing()
            if reason is not None:
                print(f"{name} is left out: {reason}")
                continue
            cached = weights_file(name, seed).exists()
            NETWORKS[name].build(seed)
            print(f"{name} seed {seed}: {'was in the cache' if cached else 'trained'}", flush=True)
    print(reached())


def reached() -> str:
    """Markdown: what every network in the cache reached on all 10,000 test images, by seed, and its seconds."""
    rows = []
    for name in NETWORKS:
        logs = [[json.loads(line) for line in file.read_text().splitlines()] for file in logs_of(name)]
        if logs:
            accuracies = ", ".join(f"{log[-1]['test']:.4f}" for log in logs)
            seconds = statistics.median(sum(line.get("seconds", 0) for line in log) for log in logs)
            rows.append([name, accuracies, f"{seconds:.0f}"])
    return table(["network", "test accuracy by seed", "seconds of one training"], rows)


def logs_of(name: str) -> list[Path]:
    """The training logs of a network, by seed."""
    files = cache().glob(f"trained/{name}-*.jsonl")
    return sorted(files, key=lambda file: int(file.stem.rpartition("-")[2]))


if __name__ == "__main__":
    main()
