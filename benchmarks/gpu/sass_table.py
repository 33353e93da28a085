"""What the machine code of some layers' launches says: the table that a test compares with what is compiled anew.

Writes sass_triton_X.Y.json and .md of benchmarks/results, for the Triton that is installed. Run it after a change of
the kernels that is meant.
"""

from __future__ import annotations

import triton

from benchmarks.common.results import environment, page, table, write

from .aot import compiled_rows
from .aot_table import CELLS, NOTES, by_architecture, head, of_triton, tiling
from .sass import REGISTERS

GROWTH = 1.05  # of a hot loop: more fails
COUNTED = ("registers", "spilled_bytes", "shared_bytes", "programs", "instructions", "unrolled", "hot_loops")


def name_of(row: dict) -> tuple:
    """What a row is found by."""
    return row["layer"], row["kernel"], row["sm"]


def over_limits(row: dict) -> list[str]:
    """What the device does not allow, or makes slow: spills, shared memory, registers."""
    registers, shared = row["registers"] * row["warps"] * 32, row["shared_bytes"]
    wrong = {
        f"spills {row['spilled_bytes']} bytes": row["spilled_bytes"] > 0,
        f"takes {shared} bytes of shared memory": shared > row["shared_limit_bytes"],
        f"takes {registers} registers of {REGISTERS}": registers > REGISTERS,
    }
    return [fault for fault, is_so in wrong.items() if is_so]


def grown(row: dict, before: dict) -> list[str]:
    """Where a kernel's hot loops are longer than in the table by more than ``GROWTH``, or are not the same."""
    made, was = ({k: v for k, v in r.items() if k not in COUNTED} for r in (row, before))
    if made != was:
        changed = sorted(k for k in made | was if made.get(k) != was.get(k))
        return [f"is launched with {k}={made.get(k)}, in the table with {was.get(k)}" for k in changed]
    loops, earlier = ([loop["instructions"] for loop in r["hot_loops"]] for r in (row, before))
    if len(loops) != len(earlier) or row["unrolled"] != before["unrolled"]:
        return [f"has hot loops of {loops} instructions, in the table {earlier}"]
    pairs = zip(loops, earlier, strict=True)
    return [f"has a hot loop of {new} instructions, in the table {old}" for new, old in pairs if new > GROWTH * old]


def faults(rows: list[dict], earlier: list[dict]) -> list[str]:
    """What is wrong with what was compiled, by what the table has of the same launches."""
    known = {name_of(row): row for row in earlier}
    lines = [(row, fault) for row in rows for fault in over_limits(row)]
    lines += [(row, fault) for row in rows if name_of(row) in known for fault in grown(row, known[name_of(row)])]
    found = [f"{', '.join(map(str, name_of(row)))}: {fault}" for row, fault in lines]
    return found + [f"{name}: not in both" for name in known.keys() ^ {name_of(row) for row in rows}]


def markdown(rows: list[dict], about: dict) -> str:
    """Per launch one line."""
    lines = by_architecture(rows, lambda row: (row["layer"], row["kernel"], *tiling(row)))
    headers = ["layer (bf16 unless said)", "kernel", "tiles", "warps x stages", *CELLS]
    return page(head(rows, about), NOTES, table(headers, lines))


def main() -> None:
    about, rows = {**environment(), "triton": triton.__version__}, compiled_rows("benchmarks.gpu.launches")
    write(of_triton("sass"), {"environment": about, "rows": rows}, markdown(rows, about))


if __name__ == "__main__":
    main()
