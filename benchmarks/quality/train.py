"""Train the networks of the suite that no package ships: python benchmarks/quality/train.py [--only NAME] [--seeds 3].

What is in the cache already is not trained again; an interrupted network starts anew.
"""

from __future__ import annotations

import argparse

import torch
from networks import NETWORKS
from training import weights_file


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
            model = NETWORKS[name].build(seed)
            if cached:
                print(f"{name} seed {seed}: in the cache, quality {NETWORKS[name].quality(model):.4f}", flush=True)


if __name__ == "__main__":
    main()
