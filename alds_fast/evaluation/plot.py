"""Quality against what is kept, one line per variant."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import replacing
from ..planning import check_plot

# Okabe and Ito's colours, told apart with every kind of colour vision; without their yellow, too light on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")
STYLES = ("-", "-.", ":")
LOG_SPAN = 10.0
AXES = {"params": "parameters kept (% of the dense model)", "flops": "FLOPs kept (% of the dense model)"}
TITLES = {"quality": "as compressed", "quality_after": "after retraining"}
MeanRows = dict[str, Any]


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that lie in the range, in percent, or its ends if fewer than two do."""
    ticks = [m * 10.0**e for e in range(-6, 3) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    return ticks if len(ticks) > 1 else [low, high]


def _scale(axes: Any, shares: Sequence[float]) -> None:
    if max(shares) <= LOG_SPAN * min(shares):
        return
    axes.set_xscale("log")
    ticks = _ticks(min(shares), max(shares))
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()


def _line(axes: Any, means: Sequence[MeanRows], x: str, y: str, number: int) -> None:
    points = sorted((100 * m[x], m[y], m[f"{y}_spread"] or 0.0) for m in means if m[y] is not None)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    style = STYLES[number // len(COLOURS) % len(STYLES)]
    axes.plot(xs, ys, style, color=colour, marker=marker, markersize=6, linewidth=1.6, label=means[0]["variant"])
    if any(p[2] for p in points):
        low, high = [p[1] - p[2] for p in points], [p[1] + p[2] for p in points]
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)


def plot_quality(path: str | os.PathLike[str], means: Sequence[MeanRows], x: str, qualities: Sequence[str]) -> None:
    """Write a picture, one panel for each of ``qualities``, of the means that ``Evaluation.summary`` gives.

    The axis of shares is logarithmic where they span more than a factor of ten. ArgumentError without matplotlib.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(m["variant"] for m in means))
    figure = Figure(figsize=(5.2 * len(qualities) + 2.2, max(4.2, 0.26 * len(names) + 1.6)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(qualities), sharey=True, squeeze=False)[0]
    for axes, quality in zip(panels, qualities, strict=True):
        for i, name in enumerate(names):
            _line(axes, [m for m in means if m["variant"] == name], x, quality, i)
        dense = sum(m["quality_dense"] for m in means) / len(means)
        axes.axhline(dense, color="0.35", linestyle="--", linewidth=1.3, label="dense")
        _scale(axes, [100 * m[x] for m in means])
        axes.set_xlabel(AXES[x], fontsize=11)
        axes.set_title(TITLES[quality], fontsize=12)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=10)
    panels[0].set_ylabel("quality", fontsize=11)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:].lower(), dpi=130)
