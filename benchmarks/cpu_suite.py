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
from pathlib import Path

import registry
import torch

import alds_fast as alds
from alds_fast.layers import weight_shape
from alds_fast.linalg import distinct_schemes, matrix_shape

RESULTS = Path(__file__).parent / "results"


def spectra(rounds: int) -> dict[str, object]:
    """ResNet-50-shaped, scheme 0, all divisors: ours against torch's routines."""
    model = registry.MODELS["resnet50"]()
    sides = {
        "alds_fast": lambda: registry.our_spectra(model),
        "alds_fast32": lambda: registry.our_spectra(model, "float32"),
        "eigvalsh64": lambda: registry.eigvalsh_per_groups(model, torch.float64),
        "eigvalsh32": lambda: registry.eigvalsh_per_groups(model, torch.float32),
        "svdvals64": lambda: registry.svdvals_slice_by_slice(model, torch.float64),
        "svdvals32": lambda: registry.svdvals_slice_by_slice(model, torch.float32),
    }
    times = registry.take_turns(sides, rounds)
    return {
        "gflop": registry.eigensolve_gflop(model),
        "times": times,
        "speedup_wall": {
            ours: {n: t["wall_s"] / times[ours]["wall_s"] for n, t in times.items()}
            for ours in ("alds_fast", "alds_fast32")
        },
        "gflop_per_cpu_s": registry.eigensolve_gflop(model) / times["alds_fast"]["cpu_s"],
    }


def compression(rounds: int) -> dict[str, object]:
    """From model to factorised model at half the parameters."""
    cases = {}
    for name, build in registry.MODELS.items():
        model = build()
        for label, schemes in (("scheme 0", (0,)), ("all schemes", (0, 1, 2, 3))):
            sides = {label: lambda m=model, s=schemes: alds.compress(m, params=0.5, schemes=s)}
            cases[f"{name}, {label}"] = registry.take_turns(sides, rounds)[label]
    return cases


def allocator(rounds: int) -> dict[str, object]:
    """300 layers x 12 groups x 4096 ranks, fronts included."""
    problem = registry.large_problem()
    sides = {f"p={p}": lambda p=p: registry.solve(problem, p) for p in (float("inf"), 2.0)}
    for call in sides.values():
        call()
    return registry.take_turns(sides, rounds)


def peak_mb(call) -> float:
    """Growth of this process' peak resident set over the call, in MB (Linux: the kernel's counter, reset before)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / 1e3


def _resident(field: str) -> float:
    """A field of /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(ln.split()[1] for ln in lines if ln.startswith(field)))


def workspace_mb(model: torch.nn.Module, schemes: tuple[int, ...]) -> float:
    """Of the largest layer: its fold in float32, as many float64 for Gram matrices, one eigenproblem a thread."""
    found = 0.0
    for module in model:
        shape = weight_shape(module)
        for scheme in distinct_schemes(schemes, shape.kernel):
            _, rows, cols = matrix_shape(shape, scheme)
            thread = 8 * min(rows, cols) ** 2
            found = max(found, rows * cols * (4 + 8) + torch.get_num_threads() * thread)
    return found / 1e6


def memory(name: str, schemes: tuple[int, ...]) -> dict[str, float]:
    """Extra memory of one analysis and of one factorisation, against the largest layer's workspace."""
    alds.compress(torch.nn.Linear(64, 64), params=0.5)
    model, kept = registry.MODELS[name](), []
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


def table(results: dict) -> str:
    """The results as Markdown."""
    env = results["environment"]
    policy = f"OMP_WAIT_POLICY {env['omp_wait_policy']}"
    lines = [f"{env['cpu']}, {env['threads']} threads, torch {env['torch']}, commit {env['commit']}, {policy}", ""]
    lines += [
        "| spectra, ResNet-50-shaped, scheme 0, all divisors | wall s | CPU s | alds_fast is | in float32 |",
        "|---|---|---|---|---|",
    ]
    for name, t in results["spectra"]["times"].items():
        faster = " | ".join(f"{ratios[name]:.1f}x faster" for ratios in results["spectra"]["speedup_wall"].values())
        lines.append(f"| {name} | {t['wall_s']:.2f} | {t['cpu_s']:.2f} | {faster} |")
    lines += ["", "| compress to half the parameters | wall s | CPU s |", "|---|---|---|"]
    lines += [f"| {n} | {t['wall_s']:.2f} | {t['cpu_s']:.2f} |" for n, t in results["compress"].items()]
    lines += ["", "| allocator, 300 x 12 x 4096 | wall s |", "|---|---|"]
    lines += [f"| {n} | {t['wall_s']:.3f} |" for n, t in results["allocator"].items()]
    lines += ["", "| extra memory, MB | analysis, peak | of it the spectra kept | largest layer's workspace |"]
    lines += ["|---|---|---|---|"]
    for name, m in results["memory"].items():
        lines.append(f"| {name} | {m['analysis_mb']:.0f} | {m['spectra_kept_mb']:.1f} | {m['workspace_mb']:.0f} |")
    lines += ["", "| extra memory, MB | factorisation, peak | of it the compressed model |", "|---|---|---|"]
    lines += [f"| {n} | {m['factorise_mb']:.0f} | {m['result_mb']:.0f} |" for n, m in results["memory"].items()]
    return "\n".join(lines) + "\n"


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
    results = {"environment": registry.environment(), "spectra": spectra(args.rounds)}
    results |= {"compress": compression(args.rounds), "allocator": allocator(5), "memory": {}}
    for name in registry.MODELS:
        for schemes in ("0", "0123"):
            command = [sys.executable, __file__, "--memory", name, schemes]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results["memory"][f"{name}, schemes {schemes}"] = json.loads(found)
    results["seconds"] = time.time() - begin
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / f"{args.name}.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
