"""Tables of the evaluation over all networks, from the folders that run.py wrote.

``python -m benchmarks.quality.summary RESULTS`` writes benchmarks/results/quality: ``quality.csv`` with every cell,
``quality.md`` with the mean over the seeds (and the spread, largest minus smallest, where it exceeds half a point),
and the picture of every network.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
from pathlib import Path

import torch

import alds_fast as alds
from benchmarks.common.results import RESULTS, commit
from benchmarks.common.results import table as markdown_table

KEPT = "variant", "share", "seed", "status", "params", "flops", "error", "quality", "quality_after", "seconds_analyze"
KEPT += "seconds_plan", "seconds_apply"
OURS = "sensitivity p=2 refit", "frobenius p=4 refit", "sensitivity p=2", "frobenius p=4"
OTHERS = "svd", "svd-energy", "svd-nuclear", "l-rank", "uniform", "alds-heuristic reference", "filters global"
OTHERS += "filters uniform", "pca"
Cells = dict[tuple[str, str, int], list[float]]  # network, variant, rank of the share: qualities


def rows_of(folder: Path) -> list[dict]:
    """Finished cells of a network, in the order in which they were run."""
    lines = (folder / "results.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row.get("status") in ("done", "cannot be met")]


def collected(results: Path) -> tuple[list[dict], Cells, dict[str, float]]:
    """All rows, qualities by cell, and the dense networks' mean qualities."""
    rows, cells, dense = [], {}, {}
    for folder in sorted(path.parent for path in results.glob("*/results.jsonl")):
        own = rows_of(folder)
        shares = sorted({row["share"] for row in own if row["variant"] != "dense"}, reverse=True)
        dense[folder.name] = statistics.mean(row["quality"] for row in own if row["variant"] == "dense")
        for row in own:
            rows.append({"network": folder.name, **{key: row.get(key) for key in KEPT}})
            if row["quality"] is not None and row["variant"] != "dense":
                key = folder.name, row["variant"], shares.index(row["share"])
                cells.setdefault(key, []).append(row["quality"])
    return rows, cells, dense


def cell_text(values: list[float] | None, best: float) -> str:
    if not values:
        return "-"
    mean, spread = statistics.mean(values), max(values) - min(values)
    text = f"{mean:.3f}" + (f" ±{spread:.3f}" if spread > 0.005 else "")
    return f"**{text}**" if mean >= best - 0.002 else text


def table(cells: Cells, networks: list[str], level: int) -> str:
    """One line per variant; in bold what is within .002 of the best of the network."""
    variants = list(dict.fromkeys(variant for _, variant, _ in cells))
    mean = {(n, v): statistics.mean(cells[n, v, level]) for n in networks for v in variants if (n, v, level) in cells}
    best = {n: max((q for (network, _), q in mean.items() if network == n), default=0.0) for n in networks}
    rows = [[v, *(cell_text(cells.get((n, v, level)), best[n]) for n in networks)] for v in variants]
    return "\n".join(markdown_table(["variant", *networks], rows))


def by_shares(rows: list[dict]) -> dict[tuple[float, ...], list[str]]:
    """Networks by the shares that they were compressed to: not all of a network may be what is compressed."""
    found: dict[str, set[float]] = {}
    for row in rows:
        if row["variant"] != "dense":
            found.setdefault(row["network"], set()).add(row["share"])
    grouped: dict[tuple[float, ...], list[str]] = {}
    for network, shares in found.items():
        grouped.setdefault(tuple(sorted(shares, reverse=True)), []).append(network)
    return grouped


def drops(cells: Cells, dense: dict[str, float], level: int) -> str:
    """Of ours and of the others, the drop in quality: median and largest over the networks."""
    rows = []
    for v in (*OURS, *OTHERS):
        lost = [dense[n] - statistics.mean(q) for (n, variant, at), q in cells.items() if variant == v and at == level]
        if lost:
            rows.append([v, f"{statistics.median(lost):.4f}", f"{max(lost):.4f}", len(lost)])
    return "\n".join(markdown_table(["variant", "median drop", "largest drop", "networks"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder that run.py wrote")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality")
    parser.add_argument("--commit", help="that made the results; the present one by default")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows, cells, dense = collected(args.results)
    with open(args.out / "quality.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["network", *KEPT], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for folder in sorted(path.parent for path in args.results.glob("*/results.jsonl")):
        every = alds.Evaluation.read(folder)
        drawn = [row for row in every.rows if row["variant"] in (*OURS, *OTHERS, "dense")]
        alds.Evaluation(drawn, every.budget).plot(args.out / f"{folder.name}.png")
    hardware = f"{platform.machine()} CPU, {os.cpu_count()} cores, torch {torch.__version__}, Python"
    parts = [f"# Quality without retraining\n\n{hardware} {platform.python_version()}, commit {commit(args.commit)}; "
             f"`python -m benchmarks.quality.run`. Means over the seeds, ± largest minus smallest where above .005; "
             f"bold: within .002 of the network's best."]  # fmt: skip
    parts.append("Dense: " + ", ".join(f"{name} {quality:.4f}" for name, quality in dense.items()) + ".")
    for shares, networks in by_shares(rows).items():
        own = {key: values for key, values in cells.items() if key[0] in networks}
        for level, share in enumerate(shares):
            parts.append(f"## params = {share:.4g}\n\n{table(own, networks, level)}\n\n{drops(own, dense, level)}")
    (args.out / "quality.md").write_text("\n\n".join(parts) + "\n")
    print(f"wrote {args.out}: {len(rows)} cells of {len(dense)} networks")


if __name__ == "__main__":
    main()
