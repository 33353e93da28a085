"""Registers, shared memory and spills of every kernel configuration, compiled ahead of time; no GPU is needed.

Writes benchmarks/results/aot.json and aot.md. The configurations are those of aot.py, which CI checks.
"""

from __future__ import annotations

from collections import defaultdict

import triton

from benchmarks.common.results import environment, page, table, write

from .aot import SHOWN, compiled_rows

TILES = (*SHOWN, "ONE_SLICE", "GROUPS", "CHUNKS", "wide")


def markdown(compilations: list[dict], about: dict) -> str:
    """Per configuration one line: registers and shared kilobytes on sm_80 / sm_90."""
    head = (
        f"triton {about['triton']}, commit {about['commit']}; {len(compilations)} compilations, "
        f"{sum(r['spilled_bytes'] > 0 for r in compilations)} of them spill, most registers "
        f"{max(r['registers'] for r in compilations)}. Limits: 255 registers a thread, "
        f"163 KiB (sm_80) and 227 KiB (sm_90) of shared memory a block."
    )
    merged: dict[tuple, dict[int, dict]] = defaultdict(dict)
    for row in compilations:
        tiles = ", ".join(f"{k}={row[k]}" for k in TILES if k in row)
        merged[row["kernel"], row["dtype"], tiles, f"{row['warps']} x {row['stages']}"][row["sm"]] = row
    rows = []
    for key, by_sm in merged.items():
        registers = " / ".join(str(by_sm[sm]["registers"]) if sm in by_sm else "-" for sm in (80, 90))
        shared = " / ".join(f"{by_sm[sm]['shared_bytes'] / 1024:.0f}" if sm in by_sm else "-" for sm in (80, 90))
        rows.append([*key, registers, shared])
    headers = ["kernel", "type", "tiles", "warps x stages", "registers sm_80 / sm_90", "shared KiB sm_80 / sm_90"]
    return page(head, table(headers, rows))


def main() -> None:
    about, compilations = {**environment(), "triton": triton.__version__}, compiled_rows()
    write("aot", {"environment": about, "rows": compilations}, markdown(compilations, about))


if __name__ == "__main__":
    main()
