"""The evaluation: every network of the suite by every variant, before retraining.

``python -m benchmarks.quality.run`` fetches and trains what is missing, goes on where an earlier run stopped, and
writes one folder per network to ``--out``; ``summary.py`` makes the tables of benchmarks/results/quality from them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import alds_fast as alds

from .networks import NETWORKS
from .variants import chosen

BUDGETS = (0.5, 0.3, 0.15)
MORE = {"minilm": (0.8, 0.6), "smollm2": (0.9, 0.8, 0.6)}  # what is not retrained has nothing left below
SLOW = "crepe-full", "smollm2"


def run(
    name: str, out: Path, budgets: tuple[float, ...], seeds: tuple[int, ...], workers: int, patterns: list[str]
) -> alds.Evaluation:
    """One network by the variants that match a pattern; shares are those of what may be compressed."""
    network = NETWORKS[name]
    shares = [network.share(network.build(0), keep) for keep in budgets]
    return alds.evaluate(
        network.build, network.quality, budgets=shares, seeds=seeds, example_inputs=network.example_inputs,
        variants=chosen(network, patterns), data=network.calibration, out=out / name, workers=workers,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names, about = [n for n in NETWORKS if n not in SLOW], f"by default all but {' and '.join(SLOW)}, which take hours"
    parser.add_argument("--only", nargs="*", default=names, help=f"names of networks; {about}")
    parser.add_argument("--budgets", type=float, nargs="*", help=f"default: 0.5 0.3 0.15, but {MORE}")
    parser.add_argument("--seeds", type=int, nargs="*", help="default: the network's three")
    parser.add_argument("--variants", nargs="*", default=["*"], help="shell-style patterns")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("quality_results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.workers == 1:
        torch.set_num_threads(1)
    for name in args.only:
        reason = NETWORKS[name].missing()
        if reason is not None:
            print(f"{name}: left out, {reason}", flush=True)
            continue
        try:
            seeds = tuple(args.seeds or NETWORKS[name].seeds)
            budgets = tuple(args.budgets or MORE.get(name, BUDGETS))
            table = run(name, args.out, budgets, seeds, args.workers, args.variants)
        except alds.AldsError as error:
            print(f"{name}: {error}", flush=True)
            continue
        print(f"\n## {name}\n\n{table}", flush=True)


if __name__ == "__main__":
    main()
