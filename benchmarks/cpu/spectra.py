"""The ways to compute spectra that are compared, and a large problem for the allocator."""

from __future__ import annotations

import numpy as np
import torch

import alds_fast as alds
from alds_fast.allocation import allocate, pareto_front
from alds_fast.linalg import divisors


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
