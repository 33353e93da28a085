"""The texts of plans: their tables, what they cost, and two of them side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..errors import PlanError
from ..text import shape_text, table
from .plan_rows import LayerPlan, bytes_held


def _error_text(error: float) -> str:
    """With two digits at least: sensitivities may be small."""
    return "0" if error == 0 else f"{error:.4f}" if error >= 1e-3 else f"{error:.1e}"


def row_cells(row: LayerPlan, held_out: bool) -> list[str]:
    """The texts of a row in the table of a plan, with a column for errors on samples kept aside if ``held_out``."""
    chosen = ["-" if v is None else str(v) for v in (row.scheme, row.groups, row.rank)]
    chosen[-1] += f" {row.pivots[:-3]}" if row.pivots else ""
    errors = ["?" if math.isnan(row.error) else _error_text(row.error)]
    if held_out:
        errors.append("-" if row.held_out is None else _error_text(row.held_out))
    name = row.name or "(model)"
    counts = [f"{row.params_before:,}", f"{row.params_after:,}"]
    return [name, row.kind, shape_text(row.shape), *chosen, *errors, *counts, row.reason or row.remark or ""]


def rows_text(rows: Sequence[LayerPlan]) -> str:
    """The table of a plan."""
    headers = ["layer", "kind", "shape", "scheme", "groups", "rank", "error", "params", "after", "reason"]
    held_out = any(row.held_out is not None for row in rows)
    if held_out:
        headers.insert(7, "held out")
    return table(headers, [row_cells(row, held_out) for row in rows], (0, 1, len(headers) - 1))


def kinds_text(rows: Sequence[LayerPlan]) -> str:
    """A table with a line for each type of layer: how many there are, how many get low-rank, and their parameters."""
    lines = []
    for kind in dict.fromkeys(row.kind for row in rows):
        these = [row for row in rows if row.kind == kind]
        low = sum(row.choice is not None for row in these)
        before, after = sum(row.params_before for row in these), sum(row.params_after for row in these)
        kept = f"{after / before:.1%}" if before else "-"
        lines.append([kind, str(len(these)), str(low), f"{before:,}", f"{after:,}", kept])
    return table(["kind", "layers", "low-rank", "params", "after", "kept"], lines)


def memory_text(costs: Mapping[str, tuple[int, int]], asked: float) -> str:
    """What a budget on memory asked for, a share or bytes, and what of it there is.

    >>> memory_text({"memory": (2_000_000, 500_000)}, 0.5)
    'memory 1 MB asked, 0.5 MB reached: weights alone, as no run was measured'
    >>> memory_text({"memory": (2_000_000, 500_000), "activations": (300_000, 400_000)}, 1_000_000)
    'memory 1 MB asked, 0.9 MB reached: weights of 0.5 MB + activations of 0.4 MB, the peak of a run as measured'
    """
    before, after = bytes_held(costs) or (0, 0)
    size = asked if asked > 1 else asked * before
    text = f"memory {size / 1e6:.4g} MB asked, {after / 1e6:.4g} MB reached: weights "
    if "activations" not in costs:
        return f"{text}alone, as no run was measured"
    weights, peak = (costs[name][1] / 1e6 for name in ("memory", "activations"))
    return f"{text}of {weights:.4g} MB + activations of {peak:.4g} MB, the peak of a run as measured"


def costs_lines(costs: Mapping[str, tuple[int, int]], memory: float | None = None) -> list[str]:
    """What a model costs before and after, as :attr:`alds_fast.Plan.costs` has it, and for a budget on memory that.

    >>> costs_lines({"memory": (2_000_000, 500_000), "activations": (300_000, 400_000), "flops": (1000, 400)})
    ['FLOPs 1,000 -> 400 (40.00% kept); weights 2 -> 0.5 MB (25.00% kept); activations 0.3 -> 0.4 MB']
    """
    parts = []
    if "flops" in costs:
        before, after = costs["flops"]
        parts.append(f"FLOPs {before:,} -> {after:,} ({after / before:.2%} kept)")
    if "memory" in costs:
        before, after = costs["memory"]
        kept = f" ({after / before:.2%} kept)" if before else ""
        parts.append(f"weights {before / 1e6:.4g} -> {after / 1e6:.4g} MB{kept}")
    if "activations" in costs:
        parts.append("activations {:.4g} -> {:.4g} MB".format(*(size / 1e6 for size in costs["activations"])))
    lines = ["; ".join(parts)] if parts else []
    return lines if memory is None or "memory" not in costs else [*lines, memory_text(costs, memory)]


def diff_text(rows: tuple[Sequence[LayerPlan], Sequence[LayerPlan]], totals: tuple[str, str]) -> str:
    """Two plans of the same layers side by side: those that differ, and below the totals of each.

    PlanError for plans of other layers.
    """
    if len({tuple((row.name, row.params_before) for row in of_one) for of_one in rows}) > 1:
        raise PlanError("diff: the other plan has other layers; both must be plans of one model")
    pairs = [pair for pair in zip(*rows, strict=True) if pair[0] != pair[1]]
    headers = ["layer", "shape", "scheme, groups, rank", "then", "error", "then", "after", "then", "change"]
    lines = []
    for pair in pairs:
        chosen = [f"{r.scheme}, {r.groups}, {r.rank} {r.pivots[:-3]}".rstrip() if r.choice else "dense" for r in pair]
        errors = ["?" if math.isnan(r.error) else _error_text(r.error) for r in pair]
        after = [r.params_after for r in pair]
        cells = [*chosen, *errors, *(f"{n:,}" for n in after), f"{after[1] - after[0]:+,}"]
        lines.append([pair[0].name or "(model)", shape_text(pair[0].shape), *cells])
    same = len(rows[0]) - len(pairs)
    head = table(headers, lines, (0, 2, 3)) + "\n" if lines else ""
    return f"{head}{len(pairs)} layers differ, {same} do not\nfirst: {totals[0]}\nthen:  {totals[1]}"
