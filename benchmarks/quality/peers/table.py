"""The table and the picture: perplexities over the dense model's, by method, share and text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alds_fast.files import write_text
from benchmarks.common.results import described, page, table

from .methods import METHODS

Rows = Sequence[dict[str, Any]]


def ratios(rows: Rows, text: str) -> dict[tuple[str, float], float]:
    """By method and share, the perplexity on a text over that of the dense model."""
    dense = next(row["perplexity"][text] for row in rows if row["kind"] == "dense")
    return {(r["method"], r["share"]): r["perplexity"][text] / dense for r in rows if r["kind"] == "cell"}


def seconds(rows: Rows) -> dict[tuple[str, float], float]:
    """CPU-seconds of every cell: of its statistics, of the methods it goes on from, and its own."""
    own = {(r["method"], r["share"]): r["seconds"] for r in rows if r["kind"] == "cell"}
    of_statistics = {r["name"]: r["seconds"] for r in rows if r["kind"] == "statistics"}
    return {cell: total for cell in own if (total := _total(*cell, own, of_statistics)) is not None}


def _total(name: str, share: float, own: dict[tuple[str, float], float], shared: dict[str, float]) -> float | None:
    """None where a method that it goes on from was left out."""
    method = METHODS[name]
    before = _total(method.after, share, own, shared) if method.after else 0.0
    if before is None or (name, share) not in own:
        return None
    return before + own[name, share] + sum(shared[need] for need in method.needs)


def text_table(rows: Rows, text: str, shares: Sequence[float]) -> str:
    """One line per method, one column per share; the best of a share is bold."""
    found = ratios(rows, text)
    best = {share: min(v for (_, s), v in found.items() if s == share) for share in shares}
    lines = []
    for name in METHODS:
        cells = [_cell(found.get((name, share)), best[share]) for share in shares]
        lines += [[name, *cells]] if any(cell != "-" for cell in cells) else []
    return table(["method", *(f"{share:.0%}" for share in shares)], lines)


def _cell(value: float | None, best: float) -> str:
    if value is None:
        return "-"
    text = f"{value:.3g}" if value >= 10 else f"{value:.2f}"
    return f"**{text}**" if value == best else text


def seconds_table(rows: Rows, shares: Sequence[float]) -> str:
    """CPU-seconds from the dense model to the compressed one."""
    found = seconds(rows)
    lines = [
        [name, *(f"{found[name, share]:.0f}" if (name, share) in found else "-" for share in shares)]
        for name in METHODS if any((name, share) in found for share in shares)
    ]  # fmt: skip
    return table(["CPU-seconds", *(f"{share:.0%}" for share in shares)], lines)


def text_page(rows: Rows) -> str:
    """The Markdown page of all rows."""
    dense = next(row for row in rows if row["kind"] == "dense")
    shares = sorted({row["share"] for row in rows if row["kind"] == "cell"}, reverse=True)
    commits = dict.fromkeys(str(row["environment"]["commit"]) for row in rows)
    environment = {**dense["environment"], "commit": ", ".join(commits)}
    perplexities = ", ".join(f"{text} {value:.2f}" for text, value in dense["perplexity"].items())
    about = (
        f"{described(environment)}; `python -m benchmarks.quality.peers`. SmolLM2-135M, perplexity over the dense "
        f"model's ({perplexities}), without labels. Columns: share of the parameters of the decoder's linear layers "
        f"that is left; embeddings stay. Peers are our own code of their formulas, see benchmarks/quality/README.md."
    )
    parts = [part for text in dense["perplexity"] for part in (f"## {text}", text_table(rows, text, shares))]
    after = "Times: statistics that methods share are counted in full for each."
    return page("# Peers, side by side", about, *parts, "## What it takes", after, seconds_table(rows, shares))


def draw(rows: Rows, file: Path) -> None:
    """A picture: one panel per text, a line per method over the shares."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    texts = list(next(row["perplexity"] for row in rows if row["kind"] == "dense"))
    figure, panels = plt.subplots(1, len(texts), figsize=(6 * len(texts), 5), squeeze=False, layout="constrained")
    for text, axes in zip(texts, panels[0], strict=True):
        found = ratios(rows, text)
        for number, name in enumerate(METHODS):
            points = sorted((share, value) for (method, share), value in found.items() if method == name)
            if points:
                style = "-o" if name.startswith("ours") else "--s"
                axes.plot(*zip(*points, strict=True), style, color=f"C{number % 10}", label=name, markersize=4)
        axes.set(yscale="log", xlabel="share of the decoder's linear layers", ylabel="perplexity / dense", title=text)
        axes.invert_xaxis()
    panels[0][0].legend(fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def write_results(rows: Rows, folder: Path) -> None:
    """peers.json, peers.md and peers.png in the folder."""
    write_text(folder / "peers.json", json.dumps(rows, indent=1) + "\n")
    write_text(folder / "peers.md", text_page(rows))
    draw(rows, folder / "peers.png")
    print(text_page(rows))
