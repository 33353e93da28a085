"""What a benchmark measured: every way to compute every case, beside the dense one and the device's limits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..evaluation import COLOURS, Saved
from ..files import replacing
from ..planning import check_plot
from ..text import ShownInNotebooks, table
from .rows import Row

FORMAT = "alds_fast.bench"
VERSION = 1
HEADERS = ["case", "way", "us", "20 % to 80 %", "speed-up", "20 % to 80 %", "share of the floor", "error"]
WORDS = {"two_op": "two calls", "compiled": "two calls, compiled"}  # other sides are called as they are


@dataclass(frozen=True)
class Benchmark(Saved, ShownInNotebooks):
    """How long cases take in every way; made by :func:`alds_fast.benchmark`.

    Attributes:
        rows: one dict a case, with "name"; by way, "dense" first, ``f"{way}_ms"``, milliseconds per call, the median
            over the rounds, and "quantiles" (20 and 80 %), "gains" (how many times as long the dense one takes, median
            and quantiles over the rounds) and "errors" (the largest relative Frobenius error against float64);
            "reasons" why a way has no time; "roofline_ms", the floor of the factorised operation by the ceilings;
            "flop_reduction", how many times fewer operations it has; "interpreted", whether Triton's interpreter ran
            the fused kernel, whose time then says nothing.
        ceilings: what the device did at best in the same run: bytes a second, operations a second.
        conditions: what it holds for: hardware, versions, threads, dtype, rounds.
    """

    rows: tuple[Row, ...]
    ceilings: dict[str, float | None]
    conditions: dict[str, Any]

    def _sides(self, row: Row) -> Iterator[tuple[str, list[str]]]:
        """Every way that was timed, and its cells."""
        for side, (low, high) in row["quantiles"].items():
            ms, (gain, *gains) = row[f"{side}_ms"], row["gains"][side]
            interpreted = row["interpreted"] and side in ("fused", "separate")
            floor = "-" if row["roofline_ms"] is None or side == "dense" else f"{row['roofline_ms'] / ms:.0%}"
            error = row["errors"].get(side)
            cells = [
                _us(ms),
                f"{_us(low)} to {_us(high)}",
                f"{gain:.2f}",
                " to ".join(f"{g:.2f}" for g in gains),
                floor,
            ]
            told = ["interpreted", *["-"] * 4] if interpreted else cells
            yield side, [*told, f"{error:.1e}" if isinstance(error, float) else error or "-"]

    @property
    def _cells(self) -> list[list[str]]:
        return [
            [row["name"] if number == 0 else "", WORDS.get(side, side), *cells]
            for row in self.rows
            for number, (side, cells) in enumerate(self._sides(row))
        ]

    @property
    def _remarks(self) -> list[str]:
        c = self.conditions
        threads = f", {c['threads']} threads" if c["threads"] else ""
        best = ", ".join(f"{name} {value:.3g}" for name, value in self.ceilings.items() if value)
        lines = [
            f"{c['device']}{threads}, torch {c['torch']}, Triton {c['triton']}, alds_fast {c['alds_fast']}, "
            f"{c['dtype']}, {c['rounds']} rounds in turns",
            f"at best, in this run: {best}; the floor is that of the factorised operation",
        ]
        reasons: dict[str, list[str]] = {}
        for row in self.rows:
            for side, why in row["reasons"].items():
                reasons.setdefault(f"no {WORDS.get(side, side)}: {why}", []).append(row["name"])
            if row["error"] and row["error"] not in row["reasons"].values():
                lines.append(f"FAILED: {row['name']}: {row['error']}")
            if row["errors_ok"] is False:
                lines.append(f"WRONG: {row['name']}: more than twice the error of two calls, or NaN")
        every = len(self.rows)
        return lines + [why if len(of) == every else f"{why} ({'; '.join(of)})" for why, of in reasons.items()]

    def __repr__(self) -> str:
        return f"<Benchmark of {len(self.rows)} cases; print() has the table>"

    def __str__(self) -> str:
        return "\n".join([table(HEADERS, self._cells, left=(0, 1)), *self._remarks])

    def to_markdown(self) -> str:
        """The table in Markdown, and what it holds for."""
        lines = [HEADERS, ["---", "---", *["---:"] * (len(HEADERS) - 2)], *self._cells]
        return "\n\n".join(["\n".join(f"| {' | '.join(cells)} |" for cells in lines), *self._remarks, ""])

    def to_json(self) -> str:
        """Everything as JSON text."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    def _draw(self, path: Path) -> None:
        check_plot(path)
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        sides = dict.fromkeys(side for row in self.rows for side in row["gains"] if side != "dense")
        figure = Figure(figsize=(7.2, 1.4 + 0.25 * len(self.rows) * max(1, len(sides))), layout="constrained")
        FigureCanvasAgg(figure)
        axes, height = figure.subplots(), 0.8 / max(1, len(sides))
        for number, side in enumerate(sides):
            places = [i + number * height for i, row in enumerate(self.rows) if _drawn(row, side)]
            gains = [row["gains"][side] for row in self.rows if _drawn(row, side)]
            middles = [gain for gain, *_ in gains]
            spread = [[m - low for m, low, _ in gains], [high - m for m, _, high in gains]]
            label = WORDS.get(side, side)
            axes.barh(places, middles, 0.9 * height, xerr=spread, color=COLOURS[number % 7], label=label)
        axes.axvline(1, color="0.35", linestyle="--", linewidth=1.3, label="dense")
        axes.set_yticks([i + 0.4 - height / 2 for i in range(len(self.rows))], [row["name"] for row in self.rows])
        axes.invert_yaxis()
        axes.set_xlabel("speed-up over the dense operation")
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)
        with replacing(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=130)


def _drawn(row: Row, side: str) -> bool:
    """Whether the side has a time that says something."""
    return side in row["gains"] and not (row["interpreted"] and side in ("fused", "separate"))


def _us(ms: float) -> str:
    """Milliseconds as microseconds, three digits and no exponent."""
    us = 1e3 * ms
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}" if us >= 10 else f"{us:.2f}"
