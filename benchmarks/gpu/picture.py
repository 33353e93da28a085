"""The GPU suite's results as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .tables import Row, ratio, sort_key

COLOURS = {"two_op": "#E69F00", "compiled": "#999999", "fused": "#0072B2"}
LABELS = {"two_op": "two library calls", "compiled": "two library calls, compiled", "fused": "fused kernel"}


def _panel(axes: Any, rows: list[Row], title: str) -> None:
    for i, row in enumerate(rows):
        values = {side: ratio(row, "dense", side) for side in COLOURS}
        there = [v for v in values.values() if v]
        if there:
            axes.plot([min(there), max(there)], [i, i], color="#dddddd", linewidth=1.2, zorder=1)
        for side, value in values.items():
            if value:
                axes.scatter(value, i, color=COLOURS[side], s=20, zorder=3 if side == "fused" else 2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [r["name"] for r in rows], fontsize=6.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log", base=2)
    ticks = [
        t for t in (0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]
    ]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", color="#eeeeee")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("times as fast as the dense layer", fontsize=8)


def picture(results: dict[str, Any], path: Path) -> None:
    """Dots of every row's ratios against dense; right of the line is faster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    rows = sorted(results["rows"], key=sort_key)
    convs = [r for r in rows if r["op"].startswith("conv")]
    linears = [r for r in rows if not r["op"].startswith("conv")]
    height = 1.6 + 0.15 * max(len(convs), len(linears), 6)
    figure, panels = pyplot.subplots(1, 2, figsize=(13, height), layout="constrained")
    for axes, some, title in zip(panels, (convs, linears), ("convolutions", "linear layers"), strict=True):
        _panel(axes, some, f"{title} ({len(some)} rows)")
    handles = [Line2D([], [], marker="o", linestyle="", color=COLOURS[s], label=LABELS[s]) for s in COLOURS]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    note = " (quick run at tiny sizes: meaningless times)" if results["quick"] else ""
    figure.suptitle(f"Low-rank operations against dense, {results['device']}, bf16{note}", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
