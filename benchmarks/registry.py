"""The models and the ways that the benchmarks compare. Every ratio comes from one run, sides taking turns."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import alds_fast as alds
from alds_fast.allocation import allocate, pareto_front
from alds_fast.linalg import divisors

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from helpers import resnet_shaped  # noqa: E402

MODELS = {
    "resnet18": lambda: resnet_shaped([2, 2, 2, 2], bottleneck=False),
    "resnet50": lambda: resnet_shaped([3, 4, 6, 3], bottleneck=True),
}


def slices_of(module: torch.nn.Module, groups: int) -> torch.Tensor:
    """(groups, f, c k1 k2 / groups) slices of the scheme 0 fold."""
    return module.weight.detach().flatten(1).unflatten(1, (groups, -1)).transpose(0, 1)


def channels(module: torch.nn.Module) -> int:
    """Channels that groups divide."""
    return module.weight.shape[1]


def svdvals_slice_by_slice(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """One torch.linalg.svdvals call for every slice."""
    for module in model:
        for k in divisors(channels(module)):
            for part in slices_of(module, k).to(dtype):
                torch.linalg.svdvals(part)


def eigvalsh_per_groups(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """One batched torch.linalg.eigvalsh of the smaller Gram matrices for every number of groups."""
    for module in model:
        for k in divisors(channels(module)):
            s = slices_of(module, k).to(dtype)
            torch.linalg.eigvalsh(s @ s.mT if s.shape[1] <= s.shape[2] else s.mT @ s)


def our_spectra(model: torch.nn.Module, precision: str = "float64") -> None:
    """Our spectra, in float64 whatever the weights' type, or in float32."""
    alds.analyze(model, schemes=(0,), precision=precision)


def eigensolve_gflop(model: torch.nn.Module) -> float:
    """4/3 n^3 of every smaller Gram matrix of scheme 0: what tridiagonalisation alone takes, unpruned."""
    total = 0.0
    for module in model:
        f, cols = module.weight.flatten(1).shape
        total += sum(k * 4 / 3 * min(f, cols // k) ** 3 for k in divisors(channels(module)))
    return total / 1e9


def large_problem(layers=300, groups=12, ranks=4096, seed=0):
    """Costs and errors of every candidate of ``layers`` square layers."""
    rng, problem = np.random.default_rng(seed), []
    for _ in range(layers):
        costs = [np.arange(1, ranks + 1) * (2**g * ranks + ranks) for g in range(groups)]
        errors = [np.sort(rng.random(ranks))[::-1] for _ in range(groups)]
        problem.append((np.concatenate([*costs, [ranks * ranks]]), np.concatenate([*errors, [0.0]])))
    return problem


def solve(problem, p):
    """Pareto fronts and allocation at half the total cost."""
    fronts = [pareto_front(costs, errors) for costs, errors in problem]
    budget = sum(int(costs[-1]) for costs, _ in problem) // 2
    return allocate(fronts, budget, p)


def take_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Median wall and CPU seconds of every side over ``rounds`` rounds, one call of each per round."""
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            begin, used = time.perf_counter(), time.process_time()
            call()
            wall[name].append(time.perf_counter() - begin)
            cpu[name].append(time.process_time() - used)
    return {n: {"wall_s": statistics.median(wall[n]), "cpu_s": statistics.median(cpu[n])} for n in sides}


def environment() -> dict[str, object]:
    """Hardware, versions and commit, to stand beside every figure."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((ln.split(":")[1].strip() for ln in lines if ln.startswith("model name")), "unknown")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "alds_fast": alds.__version__, "commit": commit.stdout.strip(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
    }  # fmt: skip
