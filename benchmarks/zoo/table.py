"""The table of the zoo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.results import described, page, save, table

Rows = Sequence[dict[str, Any]]
HEADERS = [
    "", "parameters", "eligible", "kept", "layers low-rank / eligible", "analyze, s", "plan and apply, s", "exported",
    "left out, with their share of the parameters",
]  # fmt: skip


def left_out_text(row: dict[str, Any], most: int = 3) -> str:
    """The reasons for which most parameters are left out."""
    reasons = sorted(row["left_out"].items(), key=lambda item: -item[1]["params"])
    parts = [
        f"{counts['layers']} x {reason} ({counts['params'] / row['params']:.1%})" for reason, counts in reasons[:most]
    ]
    return "; ".join([*parts, *([f"{len(reasons) - most} more reasons"] if len(reasons) > most else [])])


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    if "eligible" not in row:
        return [row["name"], *[""] * 7, f"**failed**: {row['failed']}"]
    seconds = row["seconds"]
    fitted = [f"{seconds['analyze']:.1f}", f"{seconds.get('plan', 0) + seconds.get('apply', 0):.1f}"]
    kept = f"{row['kept']:.1%}" if "kept" in row else ""
    text = f"**failed**: {row['failed']}" if "failed" in row else left_out_text(row)
    layers = f"{row.get('low_rank', '')} / {row['layers']}"
    exported = row.get("export", "")
    return [row["name"], f"{row['params']:,}", f"{row['eligible']:.1%}", kept, layers, *fitted, exported, text]


def totals(rows: Rows) -> str:
    """What holds of all of them."""
    done = [row for row in rows if "failed" not in row]
    took = {row["name"]: sum(row["seconds"][s] for s in ("analyze", "plan", "apply")) for row in done}
    half = sum(row["asked"] == 0.5 for row in done)
    slowest = max(took, key=lambda name: took[name], default="")
    exported = sum(row["export"] == "yes" for row in done)
    return (
        f"{len(done)} of {len(rows)} architectures are compressed, run, saved, loaded and compared bit for bit. {half} "
        f"keep half of their parameters; of the others less is eligible, and they keep the smallest share that can be "
        f"reached. {exported} are exported; of the other {len(done) - exported} the dense model cannot be. The slowest "
        f"is {slowest}, {took.get(slowest, 0):.0f} CPU-seconds."
    )


def write_results(rows: Rows, folder: Path) -> None:
    """zoo.md and zoo.json in the folder."""
    if not rows:
        return
    environment = {
        **rows[0]["environment"],
        "commit": ", ".join(dict.fromkeys(r["environment"]["commit"] for r in rows)),
    }
    about = (
        f"{described(environment)}; `make zoo`. Random weights; CPU-seconds of one thread. Eligible: the share of the "
        f"parameters in weights that can be decomposed, under the defaults, without data."
    )
    kept = [{key: value for key, value in row.items() if key != "environment"} for row in rows]
    text = page("# The zoo", about, totals(rows), table(HEADERS, map(cells, rows)))
    save(folder / "zoo.json", {"environment": environment, "rows": kept}, text)
