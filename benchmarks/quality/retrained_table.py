"""Tables of the evaluation after retraining, from the folders that retrained.py wrote.

``python -m benchmarks.quality.retrained_table RESULTS`` writes benchmarks/results/quality/retrained.csv, every cell,
and retrained.md: by network and variant the largest reduction of the grid that loses half a point at most, the mean
over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.common.results import RESULTS, described, environment, page, table

from .retrained import CHOSEN, DROP, GRID, PART
from .summary import folders, rows_of, write_cells

Reductions = dict[tuple[str, str], dict[int, float]]  # network, variant: by seed


def reductions(results: Path) -> tuple[list[dict], Reductions]:
    """All cells, and 1 - the smallest share that kept the quality, 0 where none did."""
    rows, saved = [], {}
    for folder in folders(results):
        cells = rows_of(folder)
        rows += cells
        dense = {row["seed"]: row["quality"] for row in cells if row["variant"] == "dense"}
        for row in cells:
            if row["variant"] == "dense":
                continue
            by_seed = saved.setdefault((folder.name, row["variant"]), {})
            by_seed.setdefault(row["seed"], 0.0)
            after = row["quality_after"]
            if after is not None and dense[row["seed"]] - after <= DROP + 1e-9:
                by_seed[row["seed"]] = max(by_seed[row["seed"]], 1 - row["share"])
    return rows, saved


def by_variant(saved: Reductions, seeds: dict[str, list[int]]) -> str:
    """Percent saved, one line per variant; in bold the largest of the network."""
    networks = list(dict.fromkeys(network for network, _ in saved))
    variants = [v for v in CHOSEN if any(v == variant for _, variant in saved)]
    mean = {key: statistics.mean(by_seed.values()) for key, by_seed in saved.items()}
    best = {n: max(m for (network, _), m in mean.items() if network == n) for n in networks}
    rows = []
    for v in variants:
        texts = [f"{100 * mean[n, v]:.0f}" if (n, v) in mean else "-" for n in networks]
        texts = [f"**{t}**" if mean.get((n, v)) == best[n] else t for n, t in zip(networks, texts, strict=True)]
        rows.append([v, *texts])
    return table(["variant", *(f"{n} ({len(seeds[n])})" for n in networks)], rows)


def complete(rows: list[dict], saved: Reductions) -> tuple[Reductions, dict[str, list[int]]]:
    """Only the seeds of a network for which every variant's search is over, and which these are."""
    ended: Reductions = {}
    seeds: dict[str, list[int]] = {}
    shares: dict[tuple[str, str, int], set[float]] = {}
    for row in rows:
        shares.setdefault((row["network"], row["variant"], row["seed"]), set()).add(row["share"])
    for network in dict.fromkeys(network for network, _ in saved):
        variants = [v for n, v in saved if n == network]
        every = set.intersection(*(set(saved[network, v]) for v in variants))
        steps = (len(GRID)).bit_length()  # of a bisection with 2^k - 1 shares
        seeds[network] = sorted(s for s in every if all(len(shares[network, v, s]) >= steps for v in variants))
        for v in variants:
            if seeds[network]:
                ended[network, v] = {s: saved[network, v][s] for s in seeds[network]}
    return ended, seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder that retrained.py wrote")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality")
    parser.add_argument("--commit", help="that made the results; the present one by default")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows, saved = reductions(args.results)
    write_cells(args.out / "retrained.csv", rows)
    ended, seeds = complete(rows, saved)
    about = (
        f"{described(environment(args.commit), timed=False)}; `python -m benchmarks.quality.retrained`. Percent of the "
        f"parameters saved at a loss of {100 * DROP:g} points at most "
        f"(the measure of the ALDS paper), after retraining over the last {100 * PART:g} % of the epochs. Out of the "
        f"shares {', '.join(f'{share:g}' for share in GRID)}, found by bisection; 0: none of them. Means over the "
        f"seeds, whose number is in brackets; bold: the network's best."
    )
    text = page("# The largest reduction after retraining", about, by_variant(ended, seeds))
    (args.out / "retrained.md").write_text(text)
    print(f"wrote {args.out}: {len(rows)} cells")


if __name__ == "__main__":
    main()
