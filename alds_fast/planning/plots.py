"""Pictures and machine-readable summaries of an analysis and a plan."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..files import replacing
from ..linalg import max_rank
from .analysis import Analysis
from .findings import WITHIN, Sweep, fewest_within
from .plan import Plan
from .plan_rows import LayerPlan

KEPT = {"params": "parameters", "flops": "FLOPs", "memory": "bytes"}
MAX_LINES = 32  # slices drawn in one panel


def analysis_dict(analysis: Analysis) -> dict[str, Any]:
    """The analysis as JSON-ready data: every layer with its candidates (scheme, groups, full rank) or its reason.

    ``within``: by error of the weight, the fewest parameters that keep it, see :mod:`alds_fast.planning.findings`.
    """
    layers = []
    for layer in analysis.layers:
        spectra = analysis.spectra.get(layer.name)
        triples = [[*fold, max_rank(spectra.layer.shape, *fold)] for fold in sorted(spectra.values)] if spectra else []
        row = {"name": layer.name, "kind": layer.kind, "shape": list(layer.weight), "params": layer.params}
        best = zip(WITHIN, fewest_within(spectra, WITHIN), strict=True) if spectra else ()
        found = {str(e): {**f.decomposition.to_dict(), "keep": f.keep} if f else None for e, f in best}
        layers.append({**row, "candidates": triples, "within": found, "reason": layer.reason})
    return {"params": analysis.params, "layers": layers}


def _panel(axes: Any, analysis: Analysis, row: LayerPlan) -> None:
    """Singular values of the chosen slices, relative to the largest, and the rank kept."""
    assert row.scheme is not None and row.groups is not None and row.rank is not None
    spectra = analysis.spectra[row.name]
    values = spectra.values[row.scheme, row.groups].flatten(0, 1)[:MAX_LINES]
    relative = (values / spectra.top[row.scheme] if spectra.top[row.scheme] > 0 else values).clamp_min(1e-9)
    axes.semilogy(range(1, values.shape[1] + 1), relative.T.numpy(), color="tab:blue", alpha=0.4, linewidth=0.8)
    axes.axvline(row.rank, color="tab:red", linewidth=1.2)
    axes.set_title(f"{row.name or '(model)'}\nscheme {row.scheme}, {row.groups} slices, rank {row.rank}", fontsize=8)
    axes.set_xlabel(f"index (error {row.error:.3f})", fontsize=7)
    axes.tick_params(labelsize=6)


def _check_types(**arguments: tuple[Any, type]) -> None:
    for name, (value, kind) in arguments.items():
        if not isinstance(value, kind):
            raise ArgumentError(
                f"{name} is a {type(value).__name__}, expected a {kind.__name__}: see the order of them"
            )


def check_plot(path: str | os.PathLike[str]) -> None:
    """ArgumentError unless a picture can be written there: matplotlib, a directory that exists, a known ending."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError("plots need matplotlib, which is not installed: pip install 'alds_fast[plot]'")
    if Path(path).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ArgumentError(f"{os.fspath(path)!r} does not end in .png, .pdf or .svg")
    if not Path(path).absolute().parent.is_dir():
        raise ArgumentError(f"the directory of {os.fspath(path)!r} does not exist")


def plot_sweep(sweep: Sweep, path: str | os.PathLike[str]) -> None:
    """Write a picture (PNG, PDF or SVG by the ending) of the largest error over what is kept, with the knee.

    Needs matplotlib (``pip install alds_fast[plot]``); raises ArgumentError without it, or for what is no sweep.
    """
    _check_types(sweep=(sweep, Sweep))
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes, knee = figure.add_subplot(), sweep.knee
    criteria = sorted({plan.criterion for plan in sweep.plans})
    axes.plot([100 * sweep.kept(plan) for plan in sweep.plans], [plan.error for plan in sweep.plans], marker="o")
    if knee is not None:
        axes.axvline(100 * sweep.kept(knee), color="tab:red", linewidth=1.2, label=f"knee: {knee.budget}")
        axes.legend()
    axes.set_xlabel(f"{KEPT[sweep.budget]} kept (% of the dense model)")
    axes.set_ylabel(f"largest error of a layer ({', '.join(criteria)})")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:].lower(), dpi=110)


def plot_plan(analysis: Analysis, plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a picture (PNG, PDF or SVG by the ending): spectra with the rank kept, and parameters before and after.

    ``plan`` must come from ``analysis``. Needs matplotlib (``pip install alds_fast[plot]``); raises ArgumentError
    without it or if the plan is not of this analysis.
    """
    _check_types(analysis=(analysis, Analysis), plan=(plan, Plan))
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in plan.layers if row.rank is not None]
    if any((row.scheme, row.groups) not in getattr(analysis.spectra.get(row.name), "values", ()) for row in rows):
        raise ArgumentError("plan: it was not made from this analysis")
    columns = min(6, max(3, math.ceil(math.sqrt(len(rows)))))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(2.7 * columns, 2.2 * lines + 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(lines + 1, columns)
    for i, row in enumerate(rows):
        _panel(figure.add_subplot(grid[i // columns, i % columns]), analysis, row)
    axes = figure.add_subplot(grid[lines, :])
    places = range(len(plan.layers))
    axes.bar([i - 0.2 for i in places], [row.params_before for row in plan.layers], 0.4, label="dense")
    axes.bar([i + 0.2 for i in places], [row.params_after for row in plan.layers], 0.4, label="compressed")
    axes.set_xticks(list(places), [row.name or "(model)" for row in plan.layers], rotation=60, ha="right", fontsize=6)
    axes.set_ylabel("parameters")
    axes.legend(fontsize=7)
    figure.suptitle(f"{plan.keep_ratio:.1%} of {plan.params_before:,} parameters, largest error {plan.error:.3f}")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:].lower(), dpi=110)
