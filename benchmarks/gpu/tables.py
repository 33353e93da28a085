"""The GPU suite's results as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from alds_fast.bench import NOT_COMPILED
from benchmarks.common.results import page, table

Row = dict[str, Any]
ABOUT_TWICE = (1.6, 2.5)  # FLOP reductions that count as "about 2x"
GRID = ("conv3x3", "conv1x1", "linear")


def ratio(row: Row, above: str, below: str) -> float | None:
    """above / below of a row, None if one was not measured (an interpreted kernel's time is none)."""
    if row["interpreted"] and {above, below} & {"fused", "separate"}:
        return None
    a, b = row.get(f"{above}_ms"), row.get(f"{below}_ms")
    return a / b if a and b else None


def geometric(values: Iterable[float | None]) -> float | None:
    """Geometric mean of those that are there."""
    measured = [v for v in values if v]
    return statistics.geometric_mean(measured) if measured else None


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """The number with a unit, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def microseconds(value: float | None) -> str:
    """Milliseconds as microseconds, three digits."""
    if value is None:
        return "-"
    us = value * 1e3
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}" if us >= 10 else f"{us:.2f}"


def grid(results: dict[str, Any]) -> list[Row]:
    """Convolutions and linear layers with about half the operations, that were measured."""
    low, high = ABOUT_TWICE
    return [
        r for r in results["rows"]
        if r["op"] in GRID and low <= r["flop_reduction"] <= high and r["deployed_ms"] and r["dense_ms"]
    ]  # fmt: skip


def _wide_convs(results: dict[str, Any]) -> list[Row]:
    return [r for r in results["rows"] if r["op"] == "conv3x3" and r["shape"]["size"] in (56, 28)]


def targets(results: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """(what, at least, measured or None): the project's aims for an H100."""
    rows = results["rows"]
    convs = [ratio(r, "two_op", "fused") for r in _wide_convs(results)]
    merged = [r for r in rows if r["op"] == "qkv"]
    gains = [g for g in (ratio(r, "dense", "deployed") for r in rows) if g]
    aims = [
        ("dense / deployed, geometric mean, convolutions and linears at about half the FLOPs", 1.3,
         geometric(ratio(r, "dense", "deployed") for r in grid(results))),
        ("dense / deployed, worst row (1.0 by choice: dense is among the three)", 1.0, min(gains, default=None)),
        ("two-op / fused, 3x3 at 56x56 and 28x28, geometric mean", 1.3, geometric(convs)),
        ("two-op / fused, 3x3 at 56x56 and 28x28, worst row", 1.3, min((c for c in convs if c), default=None)),
        ("q/k/v, up to 16 rows: three two-op layers / merged, geometric mean", 1.4,
         geometric(ratio(r, "two_op", "fused") for r in merged)),
        ("q/k/v, up to 16 rows: three fused layers / merged, geometric mean", 1.4,
         geometric(ratio(r, "separate", "fused") for r in merged)),
    ]  # fmt: skip
    for name, least in (("resnet50 b128", 1.2), ("vit-b b32", 1.4), ("vit-b b128", 1.4)):
        measured = results["end_to_end"].get(name, {}).get("ratios", {}).get("deployed_compiled")
        aims.append((f"{name}: dense compiled / deployed compiled", least, measured))
    return aims


def _table(head: str, rows: Iterable[Iterable[str]]) -> str:
    return table([c.strip() for c in head.split("|")], map(list, rows))


def _targets_table(results: dict[str, Any]) -> list[str]:
    def verdict(least: float, measured: float | None) -> str:
        return "not measured" if measured is None else "met" if measured >= least else "**missed**"

    rows = [(what, f"{least:.1f}x", number(m, 2, "x"), verdict(least, m)) for what, least, m in targets(results)]
    return ["## Targets", _table("what | at least | measured | ", rows)]


def sort_key(row: Row) -> tuple:
    """By operation and size."""
    shape, order = row["shape"], [*GRID, "qkv"]
    sizes = (shape.get(k, 0) for k in ("channels", "filters", "batch", "rows", "q"))
    return order.index(row["op"]), *sizes


def _cells(row: Row) -> list[str]:
    names = [row["name"].replace("->", "→") + (" (interpreted)" if row["interpreted"] else "")]
    names += [f"{row['flop_reduction']:.1f}x"]
    names += [microseconds(row[f"{n}_ms"]) for n in ("dense", "two_op", "compiled", "fused", "roofline")]
    spread = row["quantiles"].get(row["deployed"])
    best = f"{row['deployed']} {microseconds(row['deployed_ms'])}" if row["deployed"] else "-"
    best += f" ({microseconds(spread[0])}..{microseconds(spread[1])})" if spread else ""
    names += [best, *(number(ratio(row, *p)) for p in (("dense", "deployed"), ("dense", "fused"), ("two_op", "fused")))]
    aim = "-" if not row["aim"] else "{}, {}".format(*row["aim"])
    error = "-" if row["max_error"] is None else f"{row['max_error']:.1e}"
    return [*names, aim, error if row["errors_ok"] is not False else f"**WRONG** {error}"]


def _rows_table(results: dict[str, Any]) -> list[str]:
    head = "case | FLOPs less | dense | two-op | two-op compiled | fused | floor | kept (20 %..80 %) | dense / kept | "
    head += "dense / fused | two-op / fused | expected (dense / kept, two-op / kept) | error"
    about = "Microseconds per call, medians; ratios above 1 are gains, below 1 losses. The floor is that of the "
    about += "factorised operation."
    return ["## Operations", about, _table(head, map(_cells, sorted(results["rows"], key=sort_key)))]


def _means_table(results: dict[str, Any]) -> str:
    """Geometric means and counts of gains and losses, at about half the FLOPs and over everything."""
    rows = []
    for name, chosen in (("about half the FLOPs", grid(results)), ("all rows", results["rows"])):
        for op in (*GRID, "qkv"):
            some = [r for r in chosen if r["op"] == op]
            if not some:
                continue
            means = [
                number(geometric(ratio(r, *pair) for r in some))
                for pair in (("dense", "deployed"), ("dense", "two_op"), ("dense", "fused"), ("two_op", "fused"))
            ]
            kept = [sum(r["deployed"] == side for r in some) for side in ("dense", "two_op", "fused")]
            rows.append([f"{op}, {name}", str(len(some)), *means, *map(str, kept)])
    head = "geometric means | rows | dense / kept | dense / two-op | dense / fused | two-op / fused | "
    return _table(head + "dense kept | two-op kept | fused kept", rows)


def _losses(results: dict[str, Any]) -> str:
    """How often, and how badly, the factorised and the fused forms lose."""
    lines = []
    for above, below in (("dense", "two_op"), ("dense", "fused"), ("two_op", "fused")):
        ratios = [(ratio(r, above, below), r["name"]) for r in results["rows"]]
        ratios = sorted((v, name) for v, name in ratios if v)
        lost = [v for v, _ in ratios if v < 1]
        if ratios:
            lines.append(
                f"- {below} is slower than {above} in {len(lost)} of {len(ratios)} rows; worst {ratios[0][0]:.2f}x "
                f"({ratios[0][1]}), best {ratios[-1][0]:.2f}x ({ratios[-1][1]})"
            )
    return "\n".join(lines)


def _others_table(results: dict[str, Any]) -> list[str]:
    """Sides that only some rows have."""
    names = ("padded", "separate", "merged_two_op")
    rows = [
        [r["name"].replace("->", "→"), *(microseconds(r.get(f"{n}_ms")) for n in ("two_op", "fused", *names))]
        for r in sorted(results["rows"], key=sort_key) if any(r.get(f"{n}_ms") for n in names)
    ]  # fmt: skip
    if not rows:
        return []
    head = "case | two-op | fused | two-op, encoder padded with zeros | three fused layers | one encoder call, two-op"
    return ["Other ways, microseconds:", _table(head, rows)]


def _models(results: dict[str, Any]) -> list[str]:
    text = ["## Whole models at half the FLOPs"]
    for name, model in results["end_to_end"].items():
        plan = model.get("plan", {})
        text.append(f"### {name}, {model.get('dtype')}")
        if plan:
            text.append(
                f"{plan['factorised']} of {plan['layers']} layers factorised, {plan['params_kept']:.0%} of the "
                f"parameters; torch.compile: {model['compile_mode']!r} on both sides; deployed is deploy()'s choice"
            )
        sides = [[n, f"{t['ms']:.3f}", f"{t['q20']:.3f}..{t['q80']:.3f}"] for n, t in sorted(model["sides"].items())]
        text.append(_table("side | ms | 20 %..80 %", sides))
        text.append(_table("dense / | ", ([n, f"{v:.2f}x"] for n, v in model.get("ratios", {}).items())))
        rows = [
            [n, *(number(m[k] and m[k] / 1e6, 0) for k in ("weights_bytes", "run_bytes", "peak_bytes")),
             f"{model['errors'][n]:.1e}" if isinstance(model["errors"].get(n), float) else "-"]
            for n, m in model.get("memory", {}).items()
        ]  # fmt: skip
        text.append(_table("memory, MB | weights | added by a run | peak | error against float64", rows))
        reasons = {**model.get("reasons", {}), **({"all": model["error"]} if model.get("error") else {})}
        text.append("\n".join(f"- {n}: {r}" for n, r in reasons.items()))
        if model.get("deploy"):
            text.append(f"```\n{model['deploy']['table']}\n```")
    return text if results["end_to_end"] else [*text, "Not run."]


def _notes(results: dict[str, Any]) -> list[str]:
    """Why a side has no time, and what was not run."""
    text = [f"- {n['name']}: {n['reason']}" for n in results["not_run"]]
    by_reason: dict[str, list[str]] = {}
    for row in results["rows"]:
        for side, why in row["reasons"].items():
            if why != NOT_COMPILED:
                by_reason.setdefault(f"{side}: {why}", []).append(row["name"])
    text += [f"- {why} ({len(names)}: {'; '.join(names)})" for why, names in by_reason.items()]
    text += [f"- process ended in {d['task']}: {d['error']}" for d in results["deaths"]]
    return ["## Not run, and why a side is missing", "\n".join(text) or "Nothing."]


def _head(results: dict[str, Any]) -> list[str]:
    c, t = results["ceilings"] or {}, results["correctness"]
    text = [f"# GPU suite: {results['device']}"]
    versions = f"torch {results['torch']}, triton {results['triton']}, commit {results['commit']}."
    text += [f"{versions} bf16, channels last, CUDA graphs over rotating copies, sides in turns."]
    if results["quick"]:
        text += ["**Quick run at tiny sizes: shows that the command works; the times mean nothing.**"]
    if c:
        rates = f"copy {c['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 product {c['bf16_flops_per_s'] / 1e12:.0f} TFLOP/s"
        launch = f"launch in a graph {number(c['graph_launch_us'])} us"
        text += [f"Ceilings: {rates}, {launch}, L2 {c['l2_bytes'] / 1e6:.0f} MB."]
    if t:
        verdict = "all passed" if t["ok"] else "**FAILED**"
        text += [f"Kernel tests: {verdict}: {t['passed']} passed, {t['failed']} failed, {t['skipped']} skipped in "
                 f"{t['seconds']:.0f} s{' (stopped: no time)' if t['timed_out'] else ''}.",
                 "\n".join(f"- failed: {name}" for name in t["failures"])]  # fmt: skip
    return text


def markdown(results: dict[str, Any]) -> str:
    """Everything, for people."""
    text = _head(results) if results["quick"] else [*_head(results), *_targets_table(results)]
    if results["rows"]:
        text += [_means_table(results), _losses(results), *_rows_table(results), *_others_table(results)]
    return page(*text, *_models(results), *_notes(results))
