"""The speed and memory figures of the README, in one command: writes benchmarks/results/cpu.json and cpu.md.

Every ratio is of medians from one run in which the sides take turns. Peak memory is the growth of the resident set
over the analysis of one model in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import registry
import torch

import alds_fast as alds

RESULTS = Path(__file__).parent / "results"


def spectra(rounds: int) -> dict[str, object]:
    """ResNet-50-shaped, scheme 0, all divisors: ours against torch's routines."""
    model = registry.MODELS["resnet50"]()
    sides = {
        "alds_fast": lambda: registry.our_spectra(model),
        "eigvalsh64": lambda: registry.eigvalsh_per_groups(model, torch.float64),
        "eigvalsh32": lambda: registry.eigvalsh_per_groups(model, torch.float32),
        "svdvals64": lambda: registry.svdvals_slice_by_slice(model, torch.float64),
        "svdvals32": lambda: registry.svdvals_slice_by_slice(model, torch.float32),
    }
    times = registry.take_turns(sides, rounds)
    ours = times["alds_fast"]["wall_s"]
    return {
        "gflop": registry.eigensolve_gflop(model),
        "times": times,
        "speedup_wall": {n: t["wall_s"] / ours for n, t in times.items()},
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


def memory(name: str, schemes: tuple[int, ...]) -> dict[str, float]:
    """Growth of the resident set over one analysis, against the workspace of the largest layer."""
    alds.compress(torch.nn.Linear(64, 64), params=0.5)
    model = registry.MODELS[name]()
    largest = max(p.numel() for p in model.parameters())
    order = max(min(m.shape) for m in (p.flatten(1) for p in model.parameters() if p.dim() > 1))
    if len(schemes) > 1:
        order *= 3
    workspace = largest * (4 + 8) + torch.get_num_threads() * order**2 * 8
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    analysis = alds.analyze(model, schemes=schemes)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    kept = sum(v.numel() * 8 for s in analysis.spectra.values() for v in s.values.values())
    return {"grown_mb": grown / 1e6, "largest_layer_workspace_mb": workspace / 1e6, "spectra_kept_mb": kept / 1e6}


def table(results: dict) -> str:
    """The results as Markdown."""
    env = results["environment"]
    lines = [f"{env['cpu']}, {env['threads']} threads, torch {env['torch']}, commit {env['commit']}", ""]
    lines += [
        "| spectra, ResNet-50-shaped, scheme 0, all divisors | wall s | CPU s | alds_fast is |",
        "|---|---|---|---|",
    ]
    for name, t in results["spectra"]["times"].items():
        faster = results["spectra"]["speedup_wall"][name]
        lines.append(f"| {name} | {t['wall_s']:.2f} | {t['cpu_s']:.2f} | {faster:.1f}x faster |")
    lines += ["", "| compress to half the parameters | wall s | CPU s |", "|---|---|---|"]
    lines += [f"| {n} | {t['wall_s']:.2f} | {t['cpu_s']:.2f} |" for n, t in results["compress"].items()]
    lines += ["", "| allocator, 300 x 12 x 4096 | wall s |", "|---|---|"]
    lines += [f"| {n} | {t['wall_s']:.3f} |" for n, t in results["allocator"].items()]
    lines += ["", "| peak memory of the analysis | grown MB | workspace of the largest layer MB |", "|---|---|---|"]
    for name, m in results["memory"].items():
        lines.append(f"| {name} | {m['grown_mb']:.0f} | {m['largest_layer_workspace_mb']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", nargs=2, metavar=("MODEL", "SCHEMES"), help="one memory measurement, as JSON")
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(memory(args.memory[0], tuple(map(int, args.memory[1])))))
        return
    begin = time.time()
    results = {"environment": registry.environment(), "spectra": spectra(args.rounds)}
    results |= {"compress": compression(args.rounds), "allocator": allocator(5), "memory": {}}
    for name in registry.MODELS:
        for schemes in ("0", "0123"):
            command = [sys.executable, __file__, "--memory", name, schemes]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results["memory"][f"{name}, schemes {schemes}"] = json.loads(found)
    results["seconds"] = time.time() - begin
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cpu.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "cpu.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
