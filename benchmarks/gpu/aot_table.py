"""What the machine code of every kernel configuration says, compiled ahead of time; no GPU is needed.

Writes aot_triton_X.Y.json and .md of benchmarks/results, for the Triton that is installed. The configurations are those
of aot.py, which CI checks; what the file has of the same kernels is taken from there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import triton

from benchmarks.common.results import RESULTS, environment, page, table, write

from .aot import SHOWN, compiled_rows

TILES = (*SHOWN, "GROUPS", "CHUNKS", "KW", "SIZE", "wide", "HAS_RESIDUAL", "ACTIVATION")


NOTES = (
    "Programs: how many run on a multiprocessor at once. Then what the hot loops have, those with tensor instructions "
    "or else with loads, in their order and each without the loops inside of it: instructions, tensor instructions "
    "(HMMA, HGMMA), barriers, asynchronous copies (LDGSTS, UTMALDG). *Italic* is a kernel that the compiler unrolled: "
    "all of it counts. A cell is sm_80 / sm_90."
)


def of_triton(kind: str) -> str:
    """The name of the results of the Triton that is installed."""
    return f"{kind}_triton_{'.'.join(triton.__version__.split('.')[:2])}"


def in_loops(row: dict, kind: str) -> str:
    """What the hot loops have of one kind, one number a loop."""
    text = " + ".join(str(loop[kind]) for loop in row["hot_loops"])
    return f"*{text}*" if row["unrolled"] else text


CELLS = {
    "registers": lambda row: f"{row['registers']}" + f", spills {row['spilled_bytes']} B" * (row["spilled_bytes"] > 0),
    "shared KiB": lambda row: f"{row['shared_bytes'] / 1024:.0f}",
    "programs": lambda row: row["programs"],
    "instructions": lambda row: in_loops(row, "instructions"),
    "tensor": lambda row: in_loops(row, "tensor"),
    "barriers": lambda row: in_loops(row, "barriers"),
    "copies": lambda row: in_loops(row, "async_copies"),
}


def by_architecture(compilations: list[dict], key: Callable[[dict], tuple]) -> list[list[object]]:
    """One line for the compilations of one key; in each cell sm_80 and sm_90."""
    merged: dict[tuple, dict[int, dict]] = defaultdict(dict)
    for row in compilations:
        merged[key(row)][row["sm"]] = row
    return [
        [*cells, *(" / ".join(str(of(sms[sm])) if sm in sms else "-" for sm in (80, 90)) for of in CELLS.values())]
        for cells, sms in merged.items()
    ]


def head(compilations: list[dict], about: dict) -> str:
    """What all of a table's lines have in common."""
    return (
        f"triton {about['triton']}, commit {about['commit']}; {len(compilations)} compilations, "
        f"{sum(r['spilled_bytes'] > 0 for r in compilations)} of them spill, most registers "
        f"{max(r['registers'] for r in compilations)}. Limits: 255 registers a thread, "
        f"163 KiB (sm_80) and 227 KiB (sm_90) of shared memory a block."
    )


def tiling(row: dict) -> tuple[str, str]:
    """Tiles, then warps and stages."""
    return ", ".join(f"{k}={row[k]}" for k in TILES if k in row), f"{row['warps']} x {row['stages']}"


def markdown(compilations: list[dict], about: dict) -> str:
    """Per configuration one line."""
    lines = by_architecture(compilations, lambda row: (row["kernel"], row["dtype"], *tiling(row)))
    headers = ["kernel", "type", "tiles", "warps x stages", *CELLS]
    return page(head(compilations, about), NOTES, table(headers, lines))


def main() -> None:
    file = RESULTS / f"{of_triton('aot')}.json"
    compilations = compiled_rows("benchmarks.gpu.aot", *(("--known", str(file)) if file.exists() else ()))
    about = {**environment(), "triton": triton.__version__}
    write(of_triton("aot"), {"environment": about, "rows": compilations}, markdown(compilations, about))


if __name__ == "__main__":
    main()
