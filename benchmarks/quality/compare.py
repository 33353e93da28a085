"""How results of run.py differ from the committed ones, cell by cell: after a change, without running everything again.

``python -m benchmarks.quality.compare RESULTS`` compares the cells in the folders that run.py wrote with those of
benchmarks/results/quality/quality.csv of the same network, variant, share and seed, and prints, by variant and share
(the largest first), the mean and the extreme differences of the quality over networks and seeds.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from pathlib import Path

from benchmarks.common.results import RESULTS, table

from .summary import folders, rows_of

COMMITTED = RESULTS / "quality" / "quality.csv"
Key = tuple[str, str, float, int]


def committed() -> dict[Key, float]:
    """Qualities of the committed cells."""
    with open(COMMITTED) as file:
        rows = [row for row in csv.DictReader(file) if row["quality"]]
    return {
        (r["network"], r["variant"], round(float(r["share"]), 6), int(r["seed"])): float(r["quality"]) for r in rows
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder that run.py wrote")
    known, differences = committed(), defaultdict(list)
    for folder in folders(parser.parse_args().results):
        for row in rows_of(folder):
            key = folder.name, row["variant"], round(row["share"], 6), row["seed"]
            if row["variant"] != "dense" and row["quality"] is not None and key in known:
                differences[row["variant"], key[2]].append((row["quality"] - known[key], f"{key[0]} seed {key[3]}"))
    rows = []
    for (variant, share), values in sorted(differences.items(), key=lambda item: (item[0][0], -item[0][1])):
        mean, low, high = statistics.mean(v for v, _ in values), min(values), max(values)
        ends = [f"{value:+.4f} ({where})" for value, where in (low, high)]
        rows.append([variant, f"{share:g}", len(values), f"{mean:+.4f}", *ends])
    print(table(["variant", "share", "cells", "mean difference", "least", "largest"], rows))


if __name__ == "__main__":
    main()
