"""The GPU suite's tasks, and its results file as they come in."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from dataclasses import dataclass
from typing import Any

from alds_fast.files import write_text

from .case_list import all_cases, quick_cases

STEPS = ("correctness", "ceilings", "rows", "end_to_end", "compiled")
Results = dict[str, Any]
START = float(os.environ.get("GPU_SUITE_START", time.time()))


def say(text: str) -> None:
    """A line with the seconds since the start of the command."""
    print(f"[{time.time() - START:6.1f} s] {text}", flush=True)


@dataclass(frozen=True)
class Task:
    """``kind`` is "ceilings", "row", "compiled" or "model"; ``what`` a case, or a model's name and batch size."""

    kind: str
    what: Any = None

    @property
    def key(self) -> str:
        if self.kind == "ceilings":
            return self.kind
        return f"{self.kind} {self.what.key}" if self.kind != "model" else "model {} b{}".format(*self.what)


def tasks(args: argparse.Namespace) -> list[Task]:
    """Everything that the chosen steps and names ask for."""
    cases = quick_cases(args.device == "cuda") if args.quick else all_cases()
    models = [("tiny-resnet", 2), ("tiny-vit", 2)] if args.quick else [("resnet50", 128), ("vit-b", 32), ("vit-b", 128)]
    by_step = {
        "ceilings": [Task("ceilings")],
        "rows": [Task("row", c) for c in cases],
        "end_to_end": [Task("model", m) for m in models],
        "compiled": [Task("compiled", c) for c in cases if c.compiled],
    }
    asked = [task for step, some in by_step.items() if step in args.steps for task in some]
    return [t for t in asked if t.kind == "ceilings" or re.search(args.match, t.key)]


def clean(value: Any) -> Any:
    """The value with strings in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def save(results: Results, args: argparse.Namespace) -> None:
    """Replace the file at once, so that a reader or a kill never finds half of it."""
    done = set(results["progress"]["done"])
    waiting = [t.key for t in tasks(args) if t.key not in done]
    steps = [f"step {s}" for s in STEPS if s not in args.steps]
    results["not_run"] = [{"name": k, "reason": "not reached in the time given"} for k in waiting]
    results["not_run"] += [{"name": s, "reason": "not asked for, or too long under the interpreter"} for s in steps]
    write_text(args.file, json.dumps(clean(results), indent=1) + "\n")


def put_row(results: Results, row: dict[str, Any]) -> None:
    """Add the row, in the place of one of that name."""
    results["rows"] = [r for r in results["rows"] if r["name"] != row["name"]] + [row]


def blame(task: Task, results: Results, args: argparse.Namespace, text: str) -> None:
    """Record that a task broke."""
    say(f"BROKE: {task.key}: {text}")
    if task.kind == "row":
        put_row(results, task.what.describe() | {"error": text})
    elif task.kind == "compiled":
        for row in (r for r in results["rows"] if r["name"] == task.what.key):
            row["reasons"]["compiled"] = text
    elif task.kind == "model":
        name = task.key.removeprefix("model ")
        model = results["end_to_end"].setdefault(name, {"model": task.what[0], "batch": task.what[1], "sides": {}})
        model["error"] = text
    results["deaths"].append({"task": task.key, "error": text})
    save(results, args)
