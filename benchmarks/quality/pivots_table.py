"""Quality with pivots and without, from folders that run.py wrote.

``python -m benchmarks.quality.pivots_table RESULTS`` writes benchmarks/results/quality/pivots.md: every network and
share, for each criterion the quality with output and input pivots, and that of the same plan of plain factors. The
variants are those of variants.WITHOUT_PIVOTS.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common.results import RESULTS, described, environment, page, table

from .summary import collected
from .variants import WITHOUT_PIVOTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder that run.py wrote")
    parser.add_argument("--commit", help="that made the results; the present one by default")
    args = parser.parse_args()
    rows, cells, dense = collected(args.results)
    shares = {n: sorted({r["share"] for r in rows if r["network"] == n and r["share"]}, reverse=True) for n in dense}
    lines, differences = [], []
    for network, quality in dense.items():
        for level, share in enumerate(s for s in shares[network] if s < 1):
            plain = [cells.get((network, f"{v} no pivots", level)) for v in WITHOUT_PIVOTS]
            pairs = list(zip((cells.get((network, v, level)) for v in WITHOUT_PIVOTS), plain, strict=True))
            if not any(a and b for a, b in pairs):
                continue
            texts = [f"{a[0]:.4f} / {b[0]:.4f}" if a and b else "-" for a, b in pairs]
            lines.append([network, f"{share:.3g}", f"{quality:.4f}", *texts])
            for variant, (a, b) in zip(WITHOUT_PIVOTS, pairs, strict=True):
                differences += [(a[0] - b[0], f"{network}, {share:.3g}, {variant}")] if a and b else []
    gained, lost = sum(d > 0 for d, _ in differences), sum(d < 0 for d, _ in differences)
    least, most = min(differences), max(differences)
    text = (
        f"With pivots / without, seed 0, without retraining: better in {gained} of {len(differences)} cells, worse in "
        f"{lost}, at most by {-least[0]:.4f} ({least[1]}); the largest gain is {most[0]:.4f} ({most[1]}). Shares are "
        f"of all parameters. Of MiniLM only the encoder's linear layers are compressed."
    )
    head = f"{described(environment(args.commit), timed=False)}; `python -m benchmarks.quality.run --seeds 0`."
    made = page("# Pivots, with and without", head, text, table(["network", "share", "dense", *WITHOUT_PIVOTS], lines))
    (RESULTS / "quality" / "pivots.md").write_text(made)
    print(made)


if __name__ == "__main__":
    main()
