"""All GPU figures in one command: correctness, ceilings, operations, whole models; within a number of minutes.

    python setup.py build_ext --inplace         # once: the C++ core, where the package is not installed
    python -m benchmarks.gpu.suite              # on a GPU; 9 minutes, writes benchmarks/results/gpu_<device>.*
    python -m benchmarks.gpu.suite --out DIR --commit TEXT        # where there is no git
    python -m benchmarks.gpu.suite --quick                        # the same way at tiny sizes, a minute or two
    python -m benchmarks.gpu.suite --quick --device cpu           # without a GPU: shows that the script works
    python -m benchmarks.gpu.suite --steps rows,compiled --match conv3x3     # a part of it
    python -m benchmarks.gpu.report DIR/gpu_<device>.json         # table and picture anew from the results

What it does, in this order:

1. ``correctness``: the tests of kernels (compiled on a GPU) and of spectra and SVD in a process of their own.
2. ``ceilings``: what the device does at best (copy, bf16 product, launch in a CUDA graph).
3. ``rows``: dense, two library calls and fused kernel for convolutions of ResNet-50 and linear layers of ViT-B and
   Llama-7B in bf16: each side a CUDA graph over several copies of weights and inputs that together exceed twice the
   L2 cache; the sides take turns; medians with 20 % and 80 % quantiles. "deployed" is the fastest of the three, which
   is what alds_fast.deploy keeps. The floor is that of the factorised operation by the ceilings measured.
4. ``end_to_end``: ResNet-50 and a ViT-B with random weights at half their operations: memory, errors, times as CUDA
   graphs, eager, and compiled on both sides.
5. ``compiled``: some of the rows again, with the two library calls under torch.compile (max-autotune) as one more side.
6. Rows that did not fit before, as far as time allows. Whatever was not run is listed with the reason.

The results go to a JSON file after every step. The work runs in a second process: if it dies or hangs in a kernel, the
case at fault is noted with what happened and a new process goes on with the next. The exit code is 1 if a test fails, a
result is wrong or a case breaks. On the CPU times say nothing about GPUs; fused rows run there only under
TRITON_INTERPRET=1, tiny and marked as interpreted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from alds_fast import bench
from benchmarks.common.results import ROOT, environment

from . import report
from .device import add_options, check_options, device_name, results_file
from .state import START, STEPS, Results, blame, save, say, tasks
from .worker import LOST, worker

OF_KERNELS = "kernels", "backend", "arguments", "kernel_ops", "calls", "int8", "conv2d_walk"
TESTED = tuple(f"kernels/test_{name}" for name in OF_KERNELS)
TESTS = tuple(f"tests/{name}.py" for name in (*TESTED, "linalg/test_linalg_cuda"))
QUICK_TESTS = "test_lowrank_linears or test_zero_rows or test_two_op_runs_no_kernel or test_flops"


def header(args: argparse.Namespace) -> Results:
    """Everything known before the first measurement."""
    triton = importlib.util.find_spec("triton") and __import__("triton").__version__
    env = environment(args.commit)
    about = {"device": device_name(args.device), "torch": env["torch"], "triton": triton or None}
    about |= {"python": env["python"], "cuda": torch.version.cuda, "commit": env["commit"]}
    about |= {
        "quick": args.quick,
        "minutes": args.minutes,
        "tune": args.tune,
        "steps": list(args.steps),
        "rows": [],
        "ceilings": None,
    }
    about |= {"correctness": None, "end_to_end": {}, "not_run": [], "deaths": []}
    return about | {"progress": {"done": [], "running": None}}


def kill(process: subprocess.Popen) -> None:
    """The process and what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def variables(args: argparse.Namespace) -> dict[str, str]:
    """The environment of the processes that are started; with a GPU kernels are never interpreted."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "GPU_SUITE_START": str(START)}
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if args.device == "cuda":
        env.pop("TRITON_INTERPRET", None)
    return env


def counts(report: Path) -> dict[str, Any]:
    """Passed, failed and skipped tests, and the names of those that failed, from pytest's XML report."""
    if not report.exists():
        return {"passed": None, "failed": None, "skipped": None, "failures": []}
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    bad = [c for c in suite.iter("testcase") if c.find("failure") is not None or c.find("error") is not None]
    skipped = int(suite.get("skipped", 0))
    passed = int(suite.get("tests", 0)) - len(bad) - skipped
    names = [f"{c.get('classname')}::{c.get('name')}" for c in bad]
    return {"passed": passed, "failed": len(bad), "skipped": skipped, "failures": names[:50]}


def correctness(args: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """The tests of kernels, spectra and SVD in a process of their own."""
    report, log = args.file.with_suffix(".xml"), args.file.with_suffix(".tests.log")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS]
    if args.quick:
        command += ["-k", QUICK_TESTS]
    if args.device == "cuda" and importlib.util.find_spec("xdist"):
        command += ["-n", "6"]  # most of the time goes into compiling kernels
    report.unlink(missing_ok=True)
    begin = time.time()
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=variables(args), stdout=out, stderr=subprocess.STDOUT,
                                   start_new_session=True)  # fmt: skip
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            timed_out = process.poll() is None
            kill(process)
    code = process.returncode
    outcome = {"command": " ".join(["python", *command[1:]]), "returncode": code, "timed_out": timed_out}
    outcome |= {**counts(report), "ok": code == 0 and not timed_out, "seconds": time.time() - begin}
    report.unlink(missing_ok=True)
    outcome["tail"] = log.read_text(errors="replace")[-6000:]
    if outcome["ok"]:
        log.unlink()
    return outcome


def watch(args: argparse.Namespace) -> None:
    """Start workers until everything is done or the time is over; note what killed one."""
    command = [sys.executable, "-m", "benchmarks.gpu.suite", "--worker", *args.raw]
    command += ["--deadline", str(args.deadline), "--out", str(args.out)]
    for _ in range(8):
        process = subprocess.Popen(command, cwd=ROOT, env=variables(args), start_new_session=True)
        try:
            why = wait(process, args)
        finally:
            kill(process)
        if process.returncode == 0 or why == "the time is over":
            return
        results = json.loads(args.file.read_text())
        running = results["progress"]["running"]
        if running is None and process.returncode != LOST:
            results["deaths"].append({"task": None, "error": f"the worker left with code {process.returncode}"})
            save(results, args)
            return
        if running is not None:
            task = next(t for t in tasks(args) if t.key == running["task"])
            if process.returncode != LOST:
                blame(task, results, args, why or f"the process died with code {process.returncode}")
            results["progress"]["done"].append(task.key)
            results["progress"]["running"] = None
            save(results, args)


def wait(process: subprocess.Popen, args: argparse.Namespace) -> str | None:
    """Until the worker ends, hangs or the time is over; says which, None for the first."""
    while process.poll() is None:
        time.sleep(0.5)
        if time.time() > args.deadline:
            return "the time is over"
        try:
            running = json.loads(args.file.read_text())["progress"]["running"]
        except (OSError, ValueError):
            continue
        if running and time.time() > running["since"] + running["limit_s"]:
            return f"hung: no end after {running['limit_s']} s"
    return None


def finish(args: argparse.Namespace) -> int:
    """Table and picture from the results; what is wrong, loudly; the exit code."""
    results = json.loads(args.file.read_text())
    if results["progress"]["running"]:
        say(f"cut off in {results['progress']['running']['task']}")
    print(report.write(results, args.file), flush=True)
    wrong = report.problems(results)
    for text in wrong:
        print(f"!!! {text}", flush=True)
    say(f"written: {args.file} (and .md, .png)")
    return 1 if wrong else 0


def drive(args: argparse.Namespace) -> int:
    """The whole command."""
    args.file.parent.mkdir(parents=True, exist_ok=True)
    results = header(args)
    save(results, args)
    say(f"{results['device']}, torch {results['torch']}, triton {results['triton']}, commit {results['commit']}")
    try:
        if "correctness" in args.steps:
            results["correctness"] = outcome = correctness(args, 0.4 * args.minutes * 60)
            verdict = "passed" if outcome["ok"] else "FAILED\n" + outcome["tail"]
            say(f"correctness: {outcome['passed']} passed, {outcome['failed']} failed, {verdict}")
            save(results, args)
        if tasks(args):
            watch(args)
    finally:
        code = finish(args)
    return code


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="in all; 9, with --quick 3, on the CPU 1.5")
    add_options(parser)
    parser.add_argument("--steps", default=",".join(STEPS), help="comma-separated: " + ", ".join(STEPS))
    parser.add_argument("--match", default="", help="regular expression: only tasks whose name it finds")
    parser.add_argument("--tune", action="store_true", help="tilings for whole models first: a minute or more for each")
    parser.add_argument("--model-mode", default="default", help="of torch.compile for whole models, both sides")
    parser.add_argument("--commit", help="what the results say was measured; default: git describe")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.raw = [a for a in sys.argv[1:] if a != "--worker"]
    args.steps = tuple(args.steps.split(","))
    if set(args.steps) - set(STEPS):
        parser.error(f"--steps {','.join(args.steps)}: choose from {', '.join(STEPS)}")
    if bench.interpreted(torch.device(args.device)):  # whole models would take minutes
        args.steps = tuple(s for s in args.steps if s != "end_to_end")
    check_options(parser, args)
    if args.match and all(task.kind == "ceilings" for task in tasks(args)):
        parser.error(f"--match {args.match}: no task of these steps has such a name")
    args.minutes = args.minutes or (9.0 if not args.quick else 3.0 if args.device == "cuda" else 1.5)
    args.deadline = args.deadline or START + 60 * args.minutes - (5 if args.quick else 12)  # the report takes some
    args.out, args.file = args.out.resolve(), results_file(args, "gpu")
    return args


def main() -> int:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the report is written and children end
    if not args.worker:
        return drive(args)
    worker(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
