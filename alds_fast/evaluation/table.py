"""The table that an evaluation makes: rows, their means over seeds, CSV, JSON, Markdown and pictures."""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArgumentError
from ..files import write_text
from ..text import ShownInNotebooks
from .log import FORMAT, VERSION, Record, Records, json_record
from .plot import plot_quality
from .run_cell import DONE, SECONDS
from .variants import DENSE

COLUMNS = (
    *("variant", "method", "criterion", "p", "budget", "share", "seed", "status", "params", "flops", "error"),
    *("quality_dense", "quality", "quality_after", "drop", "drop_after", *SECONDS, "message", "torch", "alds_fast"),
)
AVERAGED = ("params", "flops", "error", "quality_dense", "quality", "quality_after", "drop", "drop_after")
ROUNDING = 1e-9  # of a difference of two qualities


@dataclass(frozen=True)
class Evaluation(ShownInNotebooks):
    """Every variant under every budget with every seed; made by :func:`alds_fast.evaluate` or :meth:`read`.

    Attributes:
        rows: one dict per cell. variant; method, criterion and p (None where the variant is a function); budget
            ("params" or "flops") and share, what was asked; seed; status: "done", "cannot be met" or "failed"; params
            and flops, the shares kept (flops None without example inputs); error, the largest relative error of a
            layer by the variant's criterion; quality_dense, quality and, with ``after=``, quality_after; drop and
            drop_after, the dense quality less these; seconds_analyze (one analysis serves many cells), seconds_plan,
            seconds_apply, seconds_after, seconds_quality; message, why it is not done; torch, alds_fast: versions.
            What is not known is None.
        budget: "params" or "flops".
    """

    rows: list[Record]
    budget: str

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Evaluation:
        """All cells ever finished in an ``out=`` folder, also of a run that was cut off.

        Raises MissingFileError, or FileFormatError for files that are something else.
        """
        records = Records.read(folder)
        place = {name: i for i, name in enumerate(records.variants)}
        latest = {(r["variant"], r["share"], r["seed"]): r for r in records.by_key.values() if r["variant"] != DENSE}
        cells = sorted(latest.values(), key=lambda r: (place.get(r["variant"], len(place)), -r["share"], r["seed"]))
        return cls.of(cells, records)

    @classmethod
    def of(cls, cells: Sequence[Record], records: Records) -> Evaluation:
        """The table of these records, with the quality of their dense models and what is lost against them."""
        budget = str((records.setting or {}).get("budget"))
        dense = {r["seed"]: r["quality"] for r in records.by_key.values() if r["variant"] == DENSE}
        return cls([_row(cell, budget, dense.get(cell["seed"])) for cell in cells], budget)

    @property
    def variants(self) -> list[str]:
        """Names in the order of the table."""
        return list(dict.fromkeys(row["variant"] for row in self.rows))

    @property
    def shares(self) -> list[float]:
        """The budgets asked for, the largest first."""
        return sorted({row["share"] for row in self.rows}, reverse=True)

    @property
    def final(self) -> str:
        """The quality that counts in the end: "quality_after" if anything was retrained, else "quality"."""
        return "quality_after" if any(row["quality_after"] is not None for row in self.rows) else "quality"

    def summary(self) -> list[Record]:
        """One dict per variant and share: cells, done, and of every number its mean and (``_spread``) spread.

        The means are over the cells that are done, the spread is their standard deviation (n - 1), None for one cell.
        """
        groups = [(v, s, self._cells(v, s)) for v in self.variants for s in self.shares]
        return [{"variant": v, "share": s, **_means(rows)} for v, s, rows in groups if rows]

    def _cells(self, variant: str, share: float) -> list[Record]:
        return [row for row in self.rows if row["variant"] == variant and row["share"] == share]

    def best(self, share: float) -> str:
        """The variant of the highest mean quality (after retraining, if there was any) at a share of the budget.

        Only variants that are done for all seeds count; of equal ones the first. ArgumentError for a share that was
        not asked for, or under which no variant is done.
        """
        if share not in self.shares:
            raise ArgumentError(f"share={share!r} was not evaluated; it was {', '.join(map(str, self.shares))}")
        complete = [s for s in self.summary() if s["share"] == share and s["done"] == s["cells"]]
        if not complete:
            raise ArgumentError(
                f"no variant is done for all seeds at {self.budget}={share:g}; see the messages in rows"
            )
        return str(max(complete, key=lambda s: s[self.final])["variant"])

    def largest_reduction(self, drop: float = 0.005, x: str = "params") -> dict[str, float]:
        """By variant, the largest share saved with a mean drop of at most ``drop``; 0 if no budget keeps to it.

        The measure of Liebenwein, Maalouf, Feldman, Rus (NeurIPS 2021): ``drop`` is in units of the quality, after
        retraining if there was any. Among the budgets that were evaluated, for which all seeds are done; 1 - the mean
        share of parameters (``x="flops"``: operations) kept.
        """
        _check_axis(x)
        name = self.final.replace("quality", "drop")
        reductions = dict.fromkeys(self.variants, 0.0)
        for s in self.summary():
            if s["done"] == s["cells"] and None not in (s[x], s[name]) and s[name] <= drop + ROUNDING:
                reductions[s["variant"]] = max(reductions[s["variant"]], 1.0 - s[x])
        return reductions

    def to_csv(self) -> str:
        """The rows as CSV, one line a cell; nothing for what is None."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def to_json(self) -> str:
        """Rows and means as JSON; null for None, "inf" for infinity."""
        head = {"format": FORMAT, "version": VERSION, "budget": self.budget}
        return json.dumps({**head, "rows": [json_record(r) for r in self.rows], "summary": self.summary()}, indent=1)

    def to_markdown(self) -> str:
        """One table per budget, mean ± spread over the seeds, the best quality in bold."""
        seeds = len({row["seed"] for row in self.rows})
        dense = _mean([q for q in {r["seed"]: r["quality_dense"] for r in self.rows}.values() if q is not None])
        spread = ", ± one standard deviation" if seeds > 1 else ""
        head = f"Dense quality: {_text(*dense)}. Means over {seeds} seed{'s' * (seeds > 1)}{spread}."
        return "\n\n".join([head, *(self._table(share) for share in self.shares)]) + "\n"

    def _table(self, share: float) -> str:
        means = [s for s in self.summary() if s["share"] == share]
        named = {"quality": "quality", "drop": "drop"}
        if self.final == "quality_after":
            named |= {"quality_after": "retrained", "drop_after": "drop, retrained"}
        named |= {"params": "params kept"} | ({"flops": "FLOPs kept"} if any(s["flops"] for s in means) else {})
        named |= {"error": "largest error"}
        best = {n: max((s[n] for s in means if s["done"] == s["cells"]), default=None) for n in named if "qual" in n}
        lines = [["variant", *named.values(), "cells"], ["---"] * (len(named) + 2)]
        for s in means:
            cells = [_cell(s, n, s["done"] == s["cells"] and s[n] == best.get(n)) for n in named]
            lines.append([s["variant"].replace("|", "\\|"), *cells, s["note"]])
        return "\n".join([f"### {self.budget} = {share:g}", "", *(f"| {' | '.join(line)} |" for line in lines)])

    def __repr__(self) -> str:
        variants = len({row["variant"] for row in self.rows})
        return f"<Evaluation of {variants} variants in {len(self.rows)} cells by {self.budget}; print() has them>"

    def __str__(self) -> str:
        return self.to_markdown()

    def plot(self, path: str | os.PathLike[str], x: str = "params") -> None:
        """Draw quality against the share of parameters (``x="flops"``: operations) kept, PNG, PDF or SVG.

        One line per variant, its spread over seeds as a band, the dense quality dashed; a second panel after
        retraining. ArgumentError without matplotlib, and if nothing was done or operations were not counted.
        """
        _check_axis(x)
        means = [s for s in self.summary() if s["quality"] is not None and s[x] is not None]
        if not means:
            raise ArgumentError(f"nothing to draw: no cell is done with {x} counted; flops need example_inputs=")
        plot_quality(path, means, x, ("quality", "quality_after") if self.final != "quality" else ("quality",))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write results.csv, results.json and table.md into a folder, each as a whole or not at all."""
        texts = {"results.csv": self.to_csv(), "results.json": self.to_json(), "table.md": self.to_markdown()}
        for name, text in texts.items():
            write_text(Path(folder) / name, text)


def _row(cell: Record, budget: str, dense: float | None) -> Record:
    known = {**cell, "budget": budget, "quality_dense": dense}
    for name in ("", "_after"):
        quality = cell[f"quality{name}"]
        known[f"drop{name}"] = None if quality is None or dense is None else dense - quality
    return {name: known[name] for name in COLUMNS}


def _check_axis(x: str) -> None:
    if x not in ("params", "flops"):
        raise ArgumentError(f"x={x!r} is neither 'params' nor 'flops'")


def _mean(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _means(rows: Sequence[Record]) -> Record:
    done = [row for row in rows if row["status"] == DONE]
    unfinished = [row["status"] for row in rows if row["status"] != DONE]
    reasons = [f"{unfinished.count(status)} {status}" for status in dict.fromkeys(unfinished)]
    note = ", ".join([f"{len(done)} of {len(rows)}", *reasons])
    means: Record = {"cells": len(rows), "done": len(done), "note": note if unfinished else str(len(rows))}
    for name in AVERAGED:
        values = [row[name] for row in done if row[name] is not None]
        means[name], means[f"{name}_spread"] = _mean(values)
    return means


def _text(mean: float | None, spread: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.4g}" + ("" if spread is None else f" ± {spread:.2g}")


def _cell(means: Record, name: str, bold: bool) -> str:
    if name in ("params", "flops"):
        return "-" if means[name] is None else f"{means[name]:.2%}"
    text = _text(means[name], means[f"{name}_spread"])
    return f"**{text}**" if bold and means[name] is not None else text
