"""What the run under ttsem takes for ordered by a ticket; its committed results; its command without ttsem."""

import json
import os
import subprocess

import numpy as np
import pytest
from support.ttsem_checks import without_ticketed

from benchmarks.common.results import RESULTS, ROOT

DRAW = "tt.atomic_rmw add, sem = 4 : i32"
PARTS, TICKET, OTHER = 1000, 5000, 6000  # addresses


def entry(program, kind, *addresses, op="", size=4):
    addresses = np.array(addresses)
    raw = None if kind == "r" else np.zeros(addresses.size * size, np.uint8)
    return program, kind, op, addresses, size, raw


def log(*, late=False, op=DRAW):
    """Two programs store a part each and draw; the second one reads both and resets the ticket."""
    entries = []
    for program in (0, 1):
        pair = [entry(program, "w", PARTS + 4 * program), entry(program, "a", TICKET, op=op)]
        entries += pair[::-1] if late else pair
    return [*entries, entry(1, "r", PARTS, PARTS + 4, OTHER), entry(1, "w", TICKET)]


def read(entries):
    return [int(a) for e in entries if e[1] == "r" for a in e[3]]


def test_what_the_last_to_draw_reads_is_in_order():
    rest = without_ticketed(log())
    assert read(rest) == [PARTS + 4, OTHER]  # its own part, which is no race, and what no ticket orders
    assert [e[1] for e in rest] == ["w", "a", "w", "a", "r"]  # the reset is gone


@pytest.mark.parametrize("entries", [log(late=True), log(op="tt.atomic_rmw add, sem = 1 : i32")])
def test_parts_stored_after_the_draw_and_relaxed_tickets_are_not(entries):
    assert PARTS in read(without_ticketed(entries))


def test_only_the_last_to_draw_is_in_order():
    early = [*log()[:2], entry(0, "r", PARTS + 4), *log()[2:]]
    assert PARTS + 4 in [int(a) for e in without_ticketed(early) if e[0] == 0 and e[1] == "r" for a in e[3]]
    assert without_ticketed([*log(), entry(2, "r", PARTS)])[-1][0] == 2  # a program that never drew


def test_committed_results_have_no_fault_and_every_kernel_in_every_type():
    results = json.loads((RESULTS / "sanitize.json").read_text())
    ran = {(row["kernel"], row["type"]) for row in results["kernels"]}
    kernels = {"lowrank_linear_kernel", "encode_rows_kernel", "encode_vectors_kernel", "decode_rows_kernel"}
    halves = {"conv2d_rows_kernel", "conv2d_walk_kernel"}  # which are for half types
    every = {(k, t) for k in (*kernels, "conv2d_taps_kernel", *halves) for t in ("bf16", "fp16", "fp32")}
    assert ran == every - {(k, "fp32") for k in halves}
    assert not results["faults"] and all(row["error_over_allowed"] <= 1 for row in results["kernels"])
    assert all(control["found"] for control in results["controls"]) and len(results["controls"]) == 6


def test_without_a_python_for_it_one_line_says_so(tmp_path):
    """No interpreter on the PATH, nor under ~/.pyenv."""
    for tool in ("bash", "dirname", "cat"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}" if os.path.exists(f"/usr/bin/{tool}") else f"/bin/{tool}")
    variables = {"PATH": str(tmp_path), "HOME": str(tmp_path), "SANITIZE_VENV": str(tmp_path / "venv")}
    command = [str(tmp_path / "bash"), str(ROOT / "tests/support/sanitize.sh")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("sanitize: skipped, ttsem needs Python 3.12")
    assert len(done.stdout.splitlines()) == 1 and not done.stderr
