"""Registers, shared memory and spills of every kernel configuration, compiled ahead of time; no GPU is needed.

Writes benchmarks/results/aot.json and aot.md. The configurations are those of aot.py, which CI checks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict

import triton

from benchmarks.common.results import ROOT, environment, table, write

TILES = (
    "BM",
    "BK",
    "BQ",
    "BR",
    "BF",
    "BN",
    "C_GROUP",
    "M",
    "RANK0",
    "LAYERS",
    "PARTS",
    "VECTORS",
    "ONE_SLICE",
    "GROUPS",
    "CHUNKS",
    "wide",
)


def rows() -> list[dict]:
    """One row per compilation, from a process in which Triton compiles instead of interpreting."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu.aot"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def markdown(found: list[dict], about: dict) -> str:
    """Per configuration one line: registers and shared kilobytes on sm_80 / sm_90."""
    lines = [
        f"triton {about['triton']}, commit {about['commit']}; {len(found)} compilations, "
        f"{sum(r['spilled_bytes'] > 0 for r in found)} of them spill, most registers "
        f"{max(r['registers'] for r in found)}. Limits: 255 registers a thread, 163 KiB (sm_80) and 227 KiB (sm_90) of "
        f"shared memory a block.",
        "",
    ]
    merged: dict[tuple, dict[int, dict]] = defaultdict(dict)
    for row in found:
        tiles = ", ".join(f"{k}={row[k]}" for k in TILES if k in row)
        merged[row["kernel"], row["dtype"], tiles, f"{row['warps']} x {row['stages']}"][row["sm"]] = row
    lines_of_table = []
    for key, by_sm in merged.items():
        registers = " / ".join(str(by_sm[sm]["registers"]) if sm in by_sm else "-" for sm in (80, 90))
        shared = " / ".join(f"{by_sm[sm]['shared_bytes'] / 1024:.0f}" if sm in by_sm else "-" for sm in (80, 90))
        lines_of_table.append([*key, registers, shared])
    headers = ["kernel", "type", "tiles", "warps x stages", "registers sm_80 / sm_90", "shared KiB sm_80 / sm_90"]
    return "\n".join([*lines, *table(headers, lines_of_table)]) + "\n"


def main() -> None:
    about, found = {**environment(), "triton": triton.__version__}, rows()
    write("aot", {"environment": about, "rows": found}, markdown(found, about))


if __name__ == "__main__":
    main()
