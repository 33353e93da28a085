"""The process of the GPU suite that measures: task after task, each kept as soon as it is done."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import torch

from alds_fast import bench

from . import models, report
from .state import Results, Task, blame, put_row, save, say, tasks

LIMIT_S = {"ceilings": 90, "row": 90, "compiled": 150, "model": 330}  # after that a task counts as hanging
LOST = 3  # exit code of a worker whose device does not answer any more


def perform(task: Task, results: Results, options: bench.BenchSettings, args: argparse.Namespace, until: float) -> str:
    """Run a task, put what it found into the results, and say it in a line."""
    if task.kind == "ceilings":
        results["ceilings"] = best = bench.ceilings(options.device, options.quick)
        return ", ".join(f"{k} {v:.3g}" for k, v in best.items() if v is not None)
    if task.kind == "model":

        def keep(result: dict[str, Any]) -> None:
            results["end_to_end"][task.key.removeprefix("model ")] = result
            save(results, args)

        return str(models.EndToEnd(*task.what, options, keep, until, args.tune).run()["ratios"])
    row = bench.measure(task.what, options, results["ceilings"], task.kind == "compiled")
    if task.kind == "row" or row["compiled_ms"] is not None:
        put_row(results, row)
    else:
        old = next((r for r in results["rows"] if r["name"] == row["name"]), row)
        old["reasons"]["compiled"] = row["reasons"].get("compiled") or str(row["error"])
        put_row(results, old)
    return report.line(row)


def run_one(task: Task, results: Results, options: bench.BenchSettings, args: argparse.Namespace, until: float) -> None:
    """Run and record a task, whatever it raises; leaves the process if the device is lost."""
    results["progress"]["running"] = {"task": task.key, "since": time.time(), "limit_s": LIMIT_S[task.kind]}
    save(results, args)
    try:
        say(f"{task.key}: {perform(task, results, options, args, until)}")
    except bench.DeviceLost as e:
        blame(task, results, args, f"the device was lost: {e}")
        os._exit(LOST)  # what an orderly end would do on the device could hang
    except Exception as e:
        blame(task, results, args, bench.error_text(e))
    results["progress"]["done"].append(task.key)
    results["progress"]["running"] = None
    save(results, args)
    bench.release(options.device)


def worker(args: argparse.Namespace) -> None:
    """Run what is left of the tasks, phase after phase, each until its own point in time."""
    results = json.loads(args.file.read_text())
    options = bench.settings(args.device, args.quick, args.model_mode)
    torch.backends.cudnn.benchmark = True
    planned, total = tasks(args), args.minutes * 60
    models = total * 0.5 if any(t.kind == "model" for t in planned) else 0
    end = args.deadline
    for kind, until in (
        ("ceilings", end), ("row", end - models), ("model", end - 0.06 * total), ("compiled", end - 0.05 * total),
        ("row", end - 0.01 * total),
    ):  # fmt: skip
        begun = time.time()
        for task in (t for t in planned if t.kind == kind and t.key not in results["progress"]["done"]):
            spent = kind == "compiled" and time.time() > begun + 0.15 * total
            if time.time() > until or spent:
                break
            run_one(task, results, options, args, end - 0.1 * total)
