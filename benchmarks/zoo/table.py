"""The table of the zoo, and its summary by library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.results import described, page, save, table

from .trial import SHARE

Rows = Sequence[dict[str, Any]]
LITTLE = 0.001  # of the parameters, which the table does not name
HEADERS = [
    "", "parameters", "eligible", "kept", "layers low-rank / eligible", "analyze, s", "plan and apply, s", "exported",
    "left out, with its share of the parameters",
]  # fmt: skip


def left_out_text(row: dict[str, Any]) -> str:
    """The reasons for which parameters are left out, most first."""
    reasons = sorted(row["left_out"].items(), key=lambda item: -item[1]["params"])
    named = [(reason, n) for reason, n in reasons if n["params"] >= LITTLE * row["params"]]
    parts = [f"{n['layers']} x {reason.partition(';')[0]} ({n['params'] / row['params']:.1%})" for reason, n in named]
    rest = sum(n["layers"] for _, n in reasons) - sum(n["layers"] for _, n in named)
    return "; ".join([*parts, *([f"{rest} of less than {LITTLE:.1%}"] if rest else [])])


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    text = f"**failed**: {row['failed']}" if "failed" in row else left_out_text(row)
    if "eligible" not in row:
        return [row["name"], *[""] * 7, text]
    seconds = row["seconds"]
    fitted = [f"{seconds['analyze']:.1f}", f"{seconds.get('plan', 0) + seconds.get('apply', 0):.1f}"]
    kept = f"{row['kept']:.1%}" if "kept" in row else ""
    layers = f"{row.get('low_rank', '')} / {row['layers']}"
    return [
        row["name"],
        f"{row['params']:,}",
        f"{row['eligible']:.1%}",
        kept,
        layers,
        *fitted,
        row.get("export", ""),
        text,
    ]


def compressed_in(row: dict[str, Any]) -> float:
    """CPU-seconds of analyze, plan and apply."""
    return sum(row["seconds"][step] for step in ("analyze", "plan", "apply"))


def summary(rows: Rows) -> str:
    """By library what holds of its architectures; the texts before and after say what the columns mean."""
    head = ["", "architectures", "failed", "at half of their parameters", "exported", "slowest, CPU-seconds"]
    lines = []
    for library in dict.fromkeys(row["name"].partition("/")[0] for row in rows):
        those = [row for row in rows if row["name"].startswith(f"{library}/")]
        done = [row for row in those if "failed" not in row]
        slowest = max(done, key=compressed_in, default=None)
        took = "" if slowest is None else f"{compressed_in(slowest):.0f}, {slowest['name'].partition('/')[2]}"
        half, exported = (sum(of) for of in ((r["asked"] == SHARE for r in done), (r["export"] == "yes" for r in done)))
        lines.append([library, len(those), len(those) - len(done), half, exported, took])
    return table(head, lines)


ABOUT = (
    "Random weights, no data, the defaults. Each architecture is compressed to half of its parameters, or where less "
    "is eligible to the smallest share that the refusal names; run; saved, loaded, and compared bit for bit; and "
    "exported by `torch.export`, where the dense model can be."
)


def write_results(rows: Rows, folder: Path) -> None:
    """zoo.md and zoo.json in the folder."""
    commits = dict.fromkeys(row["environment"]["commit"] for row in rows)
    environment = {**rows[0]["environment"], "commit": ", ".join(commits)}
    about = (
        f"{described(environment)}; `make zoo`. {ABOUT} Eligible: the share of the parameters in weights that can be "
        f"decomposed. Seconds are CPU-seconds of one thread."
    )
    kept = [{key: value for key, value in row.items() if key != "environment"} for row in rows]
    text = page("# The zoo", about, summary(rows), table(HEADERS, map(cells, rows)))
    save(folder / "zoo.json", {"environment": environment, "rows": kept}, text)
