"""The GPU suite's report beside its results, and what is wrong with them; run with a results file to make it anew."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from alds_fast.files import write_text

from .picture import picture
from .tables import Row, markdown, microseconds

EXPECTED = ("BackendError", "TimeoutError")  # no kernel for it, no time for it


def line(row: Row) -> str:
    """A row in a line, for the log."""
    times = ", ".join(f"{n} {microseconds(row.get(f'{n}_ms'))}" for n in ("dense", "two_op", "fused", "compiled"))
    text = f"us: {times}; floor {microseconds(row['roofline_ms'])}, error {row['max_error'] or float('nan'):.1e}"
    text += "" if row["errors_ok"] is not False else " WRONG"
    return text + (f" ERROR {row['error']}" if row["error"] else "")


def problems(results: dict[str, Any]) -> list[str]:
    """What makes the run a failure: failed tests, wrong results, cases that broke."""
    failures, tests = [], results["correctness"]
    if tests and not tests["ok"]:
        failures.append(f"kernel tests: {tests['failed']} failed, timed out: {tests['timed_out']}")
    failures += [f"{r['name']}: wrong, errors {r['errors']}" for r in results["rows"] if r["errors_ok"] is False]
    failures += [f"{r['name']}: {r['error']}" for r in results["rows"] if r["error"]]
    failures += [f"{d['task']}: {d['error']}" for d in results["deaths"] if not str(d["task"]).startswith("row ")]
    for name, model in results["end_to_end"].items():
        reasons = model.get("reasons", {}).items()
        failures += [f"{name}, {step}: {why}" for step, why in reasons if not why.startswith(EXPECTED)]
    return failures


def write(results: dict[str, Any], file: Path) -> str:
    """Markdown, which is returned, and picture beside the results; a picture that fails costs nothing else."""
    text = markdown(results)
    write_text(file.with_suffix(".md"), text)
    try:
        picture(results, file.with_suffix(".png"))
    except Exception as e:
        print(f"no picture: {type(e).__name__}: {e}", flush=True)
    return text


if __name__ == "__main__":
    results_file = Path(sys.argv[1])
    write(json.loads(results_file.read_text()), results_file)
