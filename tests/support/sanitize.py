"""Run every fused kernel under ttsem's checks of bounds, races and uninitialised reads, in bf16, fp16 and fp32.

``make sanitize`` runs it where a Python for it is found (sanitize.sh). A result may be as far from float64 as twice
what plain PyTorch is in the same type. Compiled float32 products add their terms in sequence: there it may be twice the
rounding of such sums where that is larger. The ticket of the few-row encoder, which ttsem calls a race, is checked to
be in order. Faulty kernels must be found. ``--write`` makes benchmarks/results/sanitize.json and sanitize.md.
"""

import argparse
import multiprocessing
import os
import sys
from collections import Counter, defaultdict
from importlib.metadata import version
from unittest import mock

import torch
import triton
from support.faulty_kernels import CONTROLS
from support.rounding import error, sequential_rounding
from support.sanitizer_cases import all_cases
from support.ttsem_checks import checked_launches

from alds_fast.kernels import backend, calls
from alds_fast.kernels.fused import conv2d, conv2d_walk, few_rows, vectors
from benchmarks.common.results import described, environment, page, table, write

TICKETED = "_encode_rows_kernel"  # the kernel whose programs draw tickets
PROCESSES = 2


@triton.jit
def _no_wait():
    """In the place of the waits of an early launch, which are inline assembly: launches run one after the other."""


def prepare():
    """One thread a process; the kernels run on CPU tensors, those of few rows and of walks as on 9.0."""
    torch.set_num_threads(1)
    backend.type_reason = lambda x: None
    few_rows.early_launch = conv2d_walk.has_wgmma = lambda x: x.dtype != torch.float16  # which runs as on 8.0
    for module, name in ((few_rows, "gdc_wait"), (few_rows, "gdc_launch_dependents"), (vectors, "gdc_wait"),
                         (vectors, "gdc_launch_dependents")):  # fmt: skip
        setattr(module, name, _no_wait)


def allowed(plain, case):
    """How far off a result may be, by how far off plain PyTorch is."""
    if case["x"].dtype != torch.float32:
        return 2 * plain
    terms = [case["encoder"][0].numel(), max(t[0].numel() for k, t in case.items() if k.startswith("decoder"))]
    return 2 * max(plain, sequential_rounding(*terms))


def _tensors(results):
    return results if isinstance(results, list) else [results]


def _compared(case, tensors, options, fused):
    """Of the result that is nearest to what is allowed: its error, that of plain PyTorch, and what is allowed."""
    exact = {k: t if t is None else t.double() for k, t in tensors.items()}
    reference = _tensors(case.call(**exact, **options, backend="two-op"))
    plain = _tensors(case.call(**tensors, **options, backend="two-op"))
    rows = [(error(y, r), error(p, r)) for y, p, r in zip(_tensors(fused), plain, reference, strict=True)]
    rows = [(e, p, allowed(p, tensors)) for e, p in rows]
    return max(rows, key=lambda row: row[0] / row[2] if row[0] == row[0] else float("inf"))


def _is_launched(wanted, launches):
    name, constants = wanted
    return any(name in x.kernel and constants.items() <= x.arguments.items() for x in launches)


def run_case(case):
    """A row of the result; "fault" says what is wrong."""
    tensors, options = case.made()
    row = {"group": case.group, "case": case.name, "type": case.type, "fault": None}
    calls._known.clear()  # other numbers of programs choose other tilings
    with mock.patch.object(conv2d, "FEW_PROGRAMS", case.programs), checked_launches() as (launches, session):
        try:
            fused = case.call(**tensors, **options, backend="fused")
        except Exception as e:  # what ttsem says of a launch, or what it cannot run
            return row | {"kernels": [x.kernel for x in launches], "tickets": 0, "fault": f"{type(e).__name__}: {e}"}
    found, plain, most = _compared(case, tensors, options, fused)
    row |= {"kernels": [x.kernel for x in launches], "tickets": sum(x.ticket for x in launches)}
    row |= {"error": found, "plain": plain, "allowed": most}
    if not found <= most:
        row["fault"] = f"off by {found:.2e}, allowed {most:.2e}"
    elif session.races_unchecked or not launches:
        row["fault"] = f"{session.races_unchecked} of {len(launches)} launches too large to be checked for races"
    elif case.wanted and not _is_launched(case.wanted, launches):
        row["fault"] = f"launched {[x.arguments for x in launches]}, not {case.wanted}"
    elif {x.kernel for x in launches if x.ticket} - {TICKETED}:
        row["fault"] = "a ticket where none is known"
    return row


def run_control(what):
    """Whether the fault is found, and in which words."""
    launch, said = CONTROLS[what]
    try:
        with checked_launches():
            launch()
    except Exception as e:
        return {"control": what, "found": said in str(e), "said": str(e).split(". ")[0]}
    return {"control": what, "found": False, "said": "nothing"}


CASES = []  # filled before the processes part


def _run(index):
    return run_case(CASES[index])


def summary(rows):
    """Per kernel and type: calls, launches, tickets, faults, and the largest errors by plain and by allowed ones."""
    by = defaultdict(list)
    for row in rows:
        for kernel in set(row["kernels"]):
            by[kernel, row["type"]].append(row)
    result = []
    for (kernel, kind), of in sorted(by.items()):
        ratios = {f"error_over_{k}": [r["error"] / r[k] for r in of if r.get(k)] for k in ("plain", "allowed")}
        result.append({
            "kernel": kernel.strip("_"), "type": kind, "cases": len(of),
            "launches": sum(r["kernels"].count(kernel) for r in of),
            "tickets": sum(r["tickets"] for r in of) if kernel == TICKETED else 0,
            "faults": sum(r["fault"] is not None for r in of), **{k: max(v, default=None) for k, v in ratios.items()},
        })  # fmt: skip
    return result


def markdown(results):
    """What ran where, per kernel and type one line, and the faulty kernels."""
    env, cases = results["environment"], results["cases"]
    groups = ", ".join(f"{n} of {group}" for group, n in cases.items())
    head = (
        f"{described(env, timed=False)}, triton {env['triton']}, ttsem {env['ttsem']}. {sum(cases.values())} calls: "
        f"{groups}. {len(results['faults'])} faults."
    )
    notes = (
        "Errors are those of a whole call against float64. Allowed is twice that of plain PyTorch in the type, or for "
        "float32 twice the rounding of sums in sequence where that is larger, which "
        f"{len(results['above_twice_plain'])} calls need. Tickets: launches that ttsem calls a race, as it knows no "
        "acquire and release. There every program stored its part before it drew, and only the last one to draw read "
        "them."
    )
    columns = ("kernel", "type", "calls", "launches", "tickets", "faults", "error / plain PyTorch", "error / allowed")
    rows = [
        [*list(row.values())[:6], *(f"{row[f'error_over_{k}']:.2f}" for k in ("plain", "allowed"))]
        for row in results["kernels"]
    ]
    found = [[c["control"], "found" if c["found"] else "NOT FOUND"] for c in results["controls"]]
    return page(head, notes, table(columns, rows), table(["a kernel that", "is"], found))


def complaints(rows, controls):
    """One line for everything that is wrong."""
    yield from (f"{r['group']}, {r['type']}, {r['case']}: {r['fault']}" for r in rows if r["fault"])
    yield from (f"a kernel that {c['control']} is not found: {c['said']}" for c in controls if not c["found"])
    if rows and not any(r["tickets"] for r in rows):
        yield "no launch had a ticket, though the encoder of few rows draws some"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="the results to benchmarks/results")
    parser.add_argument("--type", help="only the cases of this type: bf16, fp16 or fp32")
    options = parser.parse_args()
    prepare()
    CASES.extend(case for case in all_cases() if options.type in (None, case.type))
    if not CASES or (options.write and options.type):
        parser.error(f"--type {options.type}: no case has it, or it goes with --write, which takes all")
    controls = [run_control(what) for what in CONTROLS]
    rows = [run_case(CASES[0])]  # which makes torch import much that the processes then share
    with multiprocessing.get_context("fork").Pool(min(PROCESSES, os.cpu_count() or 1)) as pool:
        rows += pool.imap(_run, range(1, len(CASES)))
    wrong = list(complaints(rows, controls))
    above = [r for r in rows if r.get("error", 0) > 2 * r.get("plain", 0)]
    about = environment() | {name: version(name) for name in ("triton", "ttsem", "numpy")}
    results = {
        "environment": about, "cases": Counter(r["group"] for r in rows), "faults": wrong, "kernels": summary(rows),
        "controls": controls, "above_twice_plain": above,
    }  # fmt: skip
    if options.write:
        write("sanitize", results, markdown(results))
    else:
        print(markdown(results))
    print(*(wrong or ["no fault"]), sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
