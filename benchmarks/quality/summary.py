"""Tables of the evaluation over all networks, from the folders that run.py wrote.

``python -m benchmarks.quality.summary RESULTS`` writes benchmarks/results/quality: ``quality.csv`` with every cell,
``quality.md`` with the mean over the seeds (and the spread, largest minus smallest, where it exceeds half a point),
and the picture of every network.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import alds_fast as alds
from benchmarks.common.results import RESULTS, described, environment, page, table

KEPT = "variant", "share", "seed", "status", "params", "flops", "error", "quality", "quality_after", "seconds_analyze"
KEPT += "seconds_plan", "seconds_apply"
OURS = "sensitivity p=2 refit", "frobenius p=4 refit", "sensitivity p=2", "frobenius p=4"
OTHERS = "svd", "svd-energy", "svd-nuclear", "l-rank", "uniform", "alds-heuristic reference", "filters global"
OTHERS += "filters uniform", "pca"
Cells = dict[tuple[str, str, int], list[float]]  # network, variant, rank of the share: qualities


def folders(results: Path) -> Iterator[Path]:
    """Those of the networks; each is called like its own."""
    return (path.parent for path in sorted(results.glob("*/results.jsonl")))


def write_cells(file: Path, rows: list[dict]) -> None:
    """All cells as CSV, the columns of KEPT."""
    with open(file, "w", newline="") as opened:
        writer = csv.DictWriter(opened, ["network", *KEPT], restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def rows_of(folder: Path) -> list[dict]:
    """Finished cells of a network, with its name, in the order in which they were run."""
    rows = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    return [{**row, "network": folder.name} for row in rows if row.get("status") in ("done", "cannot be met")]


def collected(results: Path) -> tuple[list[dict], Cells, dict[str, float]]:
    """All rows, qualities by cell, and the dense networks' mean qualities."""
    rows, cells, dense = [], {}, {}
    for folder in folders(results):
        of_network = rows_of(folder)
        rows += of_network
        shares = sorted({row["share"] for row in of_network if row["variant"] != "dense"}, reverse=True)
        dense[folder.name] = statistics.mean(row["quality"] for row in of_network if row["variant"] == "dense")
        for row in of_network:
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


def by_variant(cells: Cells, networks: list[str], level: int) -> str:
    """One line per variant; in bold what is within .002 of the best of the network."""
    variants = list(dict.fromkeys(variant for _, variant, _ in cells))
    mean = {(n, v): statistics.mean(cells[n, v, level]) for n in networks for v in variants if (n, v, level) in cells}
    best = {n: max((q for (network, _), q in mean.items() if network == n), default=0.0) for n in networks}
    rows = [[v, *(cell_text(cells.get((n, v, level)), best[n]) for n in networks)] for v in variants]
    return table(["variant", *networks], rows)


def by_shares(rows: list[dict]) -> dict[tuple[float, ...], list[str]]:
    """Networks by the shares that they were compressed to: not all of a network may be what is compressed."""
    shares_of: dict[str, set[float]] = {}
    for row in rows:
        if row["variant"] != "dense":
            shares_of.setdefault(row["network"], set()).add(row["share"])
    grouped: dict[tuple[float, ...], list[str]] = {}
    for network, shares in shares_of.items():
        grouped.setdefault(tuple(sorted(shares, reverse=True)), []).append(network)
    return grouped


def drops(cells: Cells, dense: dict[str, float], level: int) -> str:
    """Of ours and of the others, the drop in quality: median and largest over the networks."""
    rows = []
    for v in (*OURS, *OTHERS):
        lost = [dense[n] - statistics.mean(q) for (n, variant, at), q in cells.items() if variant == v and at == level]
        if lost:
            rows.append([v, f"{statistics.median(lost):.4f}", f"{max(lost):.4f}", len(lost)])
    return table(["variant", "median drop", "largest drop", "networks"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder that run.py wrote")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality")
    parser.add_argument("--commit", help="that made the results; the present one by default")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows, cells, dense = collected(args.results)
    write_cells(args.out / "quality.csv", rows)
    for folder in folders(args.results):
        every = alds.Evaluation.read(folder)
        drawn = [row for row in every.rows if row["variant"] in (*OURS, *OTHERS, "dense")]
        alds.Evaluation(drawn, every.budget).plot(args.out / f"{folder.name}.png")
    parts = [
        "# Quality without retraining",
        f"{described(environment(args.commit), timed=False)}; `python -m benchmarks.quality.run`. Means over the "
        f"seeds, ± largest minus smallest where above .005; bold: within .002 of the network's best.",
        "Dense: " + ", ".join(f"{name} {quality:.4f}" for name, quality in dense.items()) + ".",
    ]
    for shares, networks in by_shares(rows).items():
        group = {key: values for key, values in cells.items() if key[0] in networks}
        for level, share in enumerate(shares):
            parts += [f"## params = {share:.4g}", by_variant(group, networks, level), drops(group, dense, level)]
    (args.out / "quality.md").write_text(page(*parts))
    print(f"wrote {args.out}: {len(rows)} cells of {len(dense)} networks")


if __name__ == "__main__":
    main()
