"""The evaluation after retraining, by the paper's measure: the largest reduction that costs half a point at most.

``python -m benchmarks.quality.retrained`` goes on where an earlier run stopped. Every network that has labels is
compressed by every variant and retrained with the learning rates of the last quarter of its training (rewinding, Renda
et al. 2020). The shares of a grid are searched by bisection, network by network and seed by seed: three retrainings
tell eight outcomes apart. ``retrained_table.py`` makes the table from the folders in ``--out``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import alds_fast as alds

from .networks import NETWORKS
from .training import fit
from .variants import chosen

GRID = (0.5, 0.3, 0.2, 0.13, 0.08, 0.05, 0.03)
DROP = 0.005  # half a point, as in the paper
PART = 0.25  # of the epochs of the training
CHOSEN = "sensitivity p=2 refit", "sensitivity p=2", "frobenius p=4", "svd", "svd-energy", "l-rank", "pca"
CHOSEN += "alds-heuristic reference", "filters global"


@dataclass(frozen=True)
class Retraining:
    """Retrains a compressed network in place as a function (model, seed) -> model."""

    network: str
    epochs: int

    @property
    def name(self) -> str:
        """What an evaluation's folder knows it by."""
        return f"last {self.epochs} epochs of {self.network}"

    def __call__(self, model: nn.Module, seed: int) -> nn.Module:
        network = NETWORKS[self.network]
        fit(model, network.train_loader(seed), network.recipe, lambda line: None, network.epochs - self.epochs)
        return model


def kept(table: alds.Evaluation, variant: str, share: float, seed: int) -> bool:
    """Whether a cell was done and lost no more than DROP."""
    rows = [r for r in table.rows if (r["variant"], r["share"], r["seed"]) == (variant, share, seed)]
    return bool(rows) and rows[0]["drop_after"] is not None and rows[0]["drop_after"] <= DROP + 1e-9


def search(name: str, seed: int, compared: dict[str, Any], out: Path, part: float) -> dict[str, float]:
    """By variant, the smallest share of GRID that keeps the quality, 1 if none does; one bisection each."""
    network = NETWORKS[name]
    after = Retraining(name, max(1, round(part * network.epochs)))
    bounds = {variant: (-1, len(GRID)) for variant in compared}  # kept at the first, not at the second
    while middles := {v: (low + high) // 2 for v, (low, high) in bounds.items() if high - low > 1}:
        at = min(middles.values())
        now = {v: compared[v] for v, middle in middles.items() if middle == at}
        table = alds.evaluate(
            network.build, network.quality, budgets=[GRID[at]], seeds=[seed], example_inputs=network.example_inputs,
            variants=now, data=network.calibration, after=after, out=out / name,
        )  # fmt: skip
        for v in now:
            low, high = bounds[v]
            bounds[v] = (at, high) if kept(table, v, GRID[at], seed) else (low, at)
    return {v: 1.0 if low < 0 else GRID[low] for v, (low, _) in bounds.items()}


def main() -> None:
    names = [name for name, network in NETWORKS.items() if network.recipe]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=names, choices=names, help="names of networks")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="default: 0")
    parser.add_argument("--variants", nargs="*", default=CHOSEN, help="shell-style patterns")
    parser.add_argument("--part", type=float, default=PART, help="of the epochs, how many are repeated")
    parser.add_argument("--out", type=Path, default=Path("retrained_results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for seed in args.seeds:
        for name in args.only:
            network = NETWORKS[name]
            if reason := network.missing():
                print(f"{name}: left out, {reason}", flush=True)
                continue
            try:
                shares = search(name, seed, chosen(network, args.variants), args.out, args.part)
            except alds.AldsError as error:
                print(f"{name} seed {seed}: {error}", flush=True)
                continue
            print(f"{name} seed {seed}: " + ", ".join(f"{v} {s:g}" for v, s in shares.items()), flush=True)


if __name__ == "__main__":
    main()
