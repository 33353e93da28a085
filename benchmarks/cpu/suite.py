"""The speed and memory figures of the README, in one command: writes benchmarks/results/<name>.json and .md.

Every ratio is of medians from one run in which the sides take turns. Memory is the growth of the peak resident set of
a fresh process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch

import alds_fast as alds
from alds_fast.layers import weight_shape
from alds_fast.linalg import distinct_schemes, matrix_shape
from benchmarks.common.measure import peak_mb, take_turns
from benchmarks.common.networks import SHAPED
from benchmarks.common.results import described, environment, page, table, write

from .spectra import eigensolve_gflop, eigvalsh_per_groups, large_problem, our_spectra, solve, svdvals_slice_by_slice


def spectra(rounds: int) -> dict[str, object]:
    """ResNet-50-shaped, scheme 0, all divisors: ours against torch's routines."""
    model = SHAPED["resnet50"]()
    sides = {
        "alds_fast": lambda: our_spectra(model),
        "alds_fast32": lambda: our_spectra(model, "float32"),
        "eigvalsh64": lambda: eigvalsh_per_groups(model, torch.float64),
        "eigvalsh32": lambda: eigvalsh_per_groups(model, torch.float32),
        "svdvals64": lambda: svdvals_slice_by_slice(model, torch.float64),
        "svdvals32": lambda: svdvals_slice_by_slice(model, torch.float32),
    }
    times = take_turns(sides, rounds)
    return {
        "gflop": eigensolve_gflop(model),
        "times": times,
        "speedup_wall": {
            ours: {n: t["wall_s"] / times[ours]["wall_s"] for n, t in times.items()}
            for ours in ("alds_fast", "alds_fast32")
        },
        "gflop_per_cpu_s": eigensolve_gflop(model) / times["alds_fast"]["cpu_s"],
    }


def compression(rounds: int) -> dict[str, object]:
    """From model to factorised model at half the parameters."""
    cases = {}
    for name, build in SHAPED.items():
        model = build()
        for label, schemes in (("scheme 0", (0,)), ("all schemes", (0, 1, 2, 3))):
            sides = {label: lambda m=model, s=schemes: alds.compress(m, params=0.5, schemes=s)}
            cases[f"{name}, {label}"] = take_turns(sides, rounds)[label]
    return cases


def allocator(rounds: int) -> dict[str, object]:
    """300 layers x 12 groups x 4096 ranks, fronts included."""
    problem = large_problem()
    sides = {f"p={p}": lambda p=p: solve(problem, p) for p in (float("inf"), 2.0)}
    for call in sides.values():
        call()
    return take_turns(sides, rounds)


def workspace_mb(model: torch.nn.Module, schemes: tuple[int, ...]) -> float:
    """Of the largest layer: its fold in float32, as many float64 for Gram matrices, one eigenproblem a thread."""
    most = 0.0
    for module in model:
        shape = weight_shape(module)
        for scheme in distinct_schemes(schemes, shape.kernel):
            _, rows, cols = matrix_shape(shape, scheme)
            thread = 8 * min(rows, cols) ** 2
            most = max(most, rows * cols * (4 + 8) + torch.get_num_threads() * thread)
    return most / 1e6


def memory(name: str, schemes: tuple[int, ...]) -> dict[str, float]:
    """Extra memory of one analysis and of one factorisation, against the largest layer's workspace."""
    alds.compress(torch.nn.Linear(64, 64), params=0.5)
    model, kept = SHAPED[name](), []
    analysis_mb = peak_mb(lambda: kept.append(alds.analyze(model, schemes=schemes)))
    plan = kept[0].plan(params=0.5)
    factors_mb = peak_mb(lambda: kept.append(plan.apply(model)))
    spectra = sum(v.numel() * 8 for s in kept[0].spectra.values() for v in s.values.values()) / 1e6
    result = sum(p.numel() * 4 for p in kept[1].parameters()) / 1e6
    workspace = workspace_mb(model, schemes)
    return {
        "workspace_mb": workspace, "analysis_mb": analysis_mb, "spectra_kept_mb": spectra,
        "factorise_mb": factors_mb, "result_mb": result,
    }  # fmt: skip


def markdown(results: dict) -> str:
    """The results as Markdown."""
    ratios, memory = results["spectra"]["speedup_wall"].values(), results["memory"].items()
    return page(
        described(results["environment"]),
        table(
            ["spectra, ResNet-50-shaped, scheme 0, all divisors", "wall s", "CPU s", "alds_fast is", "in float32"],
            [[n, f"{t['wall_s']:.2f}", f"{t['cpu_s']:.2f}", *(f"{r[n]:.1f}x faster" for r in ratios)]
             for n, t in results["spectra"]["times"].items()],
        ),
        table(
            ["compress to half the parameters", "wall s", "CPU s"],
            [[n, f"{t['wall_s']:.2f}", f"{t['cpu_s']:.2f}"] for n, t in results["compress"].items()],
        ),
        table(
            ["allocator, 300 x 12 x 4096", "wall s"],
            [[n, f"{t['wall_s']:.3f}"] for n, t in results["allocator"].items()],
        ),
        table(
            ["extra memory, MB", "analysis, peak", "of it the spectra kept", "largest layer's workspace"],
            [[n, f"{m['analysis_mb']:.0f}", f"{m['spectra_kept_mb']:.1f}", f"{m['workspace_mb']:.0f}"]
             for n, m in memory],
        ),
        table(
            ["extra memory, MB", "factorisation, peak", "of it the compressed model"],
            [[n, f"{m['factorise_mb']:.0f}", f"{m['result_mb']:.0f}"] for n, m in memory],
        ),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="cpu", help="of the files under benchmarks/results")
    parser.add_argument("--memory", nargs=2, metavar=("MODEL", "SCHEMES"), help="one memory measurement, as JSON")
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(memory(args.memory[0], tuple(map(int, args.memory[1])))))
        return
    begin = time.time()
    alds.compress(torch.nn.Linear(64, 64), params=0.5)  # load and compile everything
    results = {"environment": environment(), "spectra": spectra(args.rounds)}
    results |= {"compress": compression(args.rounds), "allocator": allocator(5), "memory": {}}
    for name in SHAPED:
        for schemes in ("0", "0123"):
            command = [sys.executable, "-m", "benchmarks.cpu.suite", "--memory", name, schemes]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results["memory"][f"{name}, schemes {schemes}"] = json.loads(output)
    results["seconds"] = time.time() - begin
    write(args.name, results, markdown(results))


if __name__ == "__main__":
    main()
