"""Compress, run, save, load, compare and export every architecture of the zoo, with random weights.

``python -m benchmarks.zoo`` appends one line per architecture to ``results.jsonl`` in ``--out`` and writes the table to
``--page``, benchmarks/results. Started again it goes on with those that are not there yet. Each has a process of its
own.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.results import RESULTS, environment

from . import of_timm, of_torch, of_torchvision, of_transformers
from .case import Case
from .libraries import import_libraries
from .table import write_results
from .trial import Trial

CASES = {case.name: case for module in (of_torch, of_torchvision, of_timm, of_transformers) for case in module.CASES}


def in_a_process(case: Case, limit: float) -> dict[str, Any]:
    """The row of an architecture, also where its process ends or takes more than ``limit`` seconds."""
    forked = multiprocessing.get_context("fork")  # with the libraries imported
    here, there = forked.Pipe(duplex=False)
    process = forked.Process(target=_send, args=(case, there))
    process.start()
    there.close()
    began, row = time.monotonic(), {"name": case.name}
    while here.poll(max(0.0, began + limit - time.monotonic())):
        try:
            row = here.recv()
        except EOFError:
            break
    if process.is_alive() and time.monotonic() >= began + limit:
        process.kill()
        row["failed"] = f"killed after {limit:g} s in step {row.get('step')!r}"
    process.join()
    if process.exitcode and "failed" not in row:
        row["failed"] = f"its process ended with exit code {process.exitcode} in step {row.get('step')!r}"
    return row


def _send(case: Case, there: Any) -> None:
    torch.set_num_threads(1)  # a fork of a process with several has none but the first
    Trial(case, there.send).run()


def chosen(patterns: Sequence[str]) -> list[Case]:
    """Those whose name one of the shell-style patterns matches."""
    return [case for name, case in CASES.items() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def run(patterns: Sequence[str], out: Path, limit: float) -> list[dict[str, Any]]:
    """Try those architectures, but those that are in the folder's file and did not fail; all rows of the file then."""
    out.mkdir(parents=True, exist_ok=True)
    file, found = out / "results.jsonl", environment()
    rows = {r["name"]: r for r in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    for case in chosen(patterns):
        if case.name in rows and "failed" not in rows[case.name]:
            continue
        rows[case.name] = in_a_process(case, limit) | {"environment": found}
        with open(file, "a") as opened:
            opened.write(json.dumps(rows[case.name]) + "\n")
        print(case.name, rows[case.name].get("failed", "done"), rows[case.name].get("seconds"), flush=True)
    return [rows[name] for name in CASES if name in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", nargs="*", default=["*"], help="shell-style patterns of names, as 'timm/vit*'")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one architecture")
    parser.add_argument("--out", type=Path, default=Path("zoo_results"))
    parser.add_argument("--page", type=Path, default=RESULTS, help="folder of the table")
    args = parser.parse_args()
    import_libraries()
    rows = run(args.match, args.out, args.limit)
    write_results(rows, args.page)
    raise SystemExit(any("failed" in row for row in rows))


if __name__ == "__main__":
    main()
