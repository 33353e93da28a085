"""The p-norm under several budgets: against brute force, the bound, the greedy rest, degenerate budgets."""

import itertools

import numpy as np
import pytest

from alds_fast.allocation.pareto import p_norm
from alds_fast.allocation.several_budgets import least_largest
from alds_fast.allocation.several_p_norm import least_sum_within


def problem(seed, layers=4, candidates=7, budgets=2):
    rng = np.random.default_rng(seed)
    errors = [np.append(np.sort(rng.random(candidates))[::-1], 0.0) for _ in range(layers)]
    costs = [rng.integers(1, 60, (budgets, candidates + 1)) for _ in range(layers)]
    for cost in costs:
        cost.sort(axis=1)
    limits = np.array([sum(int(c[k].mean()) for c in costs) for k in range(budgets)], dtype=np.int64)
    return costs, errors, limits


def optimum(costs, errors, limits, p):
    norms = []
    for picks in itertools.product(*(range(len(e)) for e in errors)):
        if (sum(c[:, i] for c, i in zip(costs, picks, strict=True)) <= limits).all():
            norms.append(p_norm(np.array([e[i] for e, i in zip(errors, picks, strict=True)]), p))
    return min(norms)


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("budgets", [2, 3])
def test_against_brute_force(p, budgets):
    excess = []
    for seed in range(12):
        costs, errors, limits = problem(seed, budgets=budgets)
        known = least_largest(costs, errors, limits)[0]
        picks, bound = least_sum_within(costs, errors, limits, p, known)
        assert (sum(c[:, i] for c, i in zip(costs, picks, strict=True)) <= limits).all()
        value = p_norm(np.array([e[i] for e, i in zip(errors, picks, strict=True)]), p)
        best = optimum(costs, errors, limits, p)
        assert bound <= best * (1 + 1e-9) and best <= value * (1 + 1e-9)
        excess.append(value / best - 1)
    assert np.mean(excess) < 0.1  # of four layers; the more there are the closer


def test_many_layers_come_within_a_hundredth_of_the_bound():
    costs, errors, limits = problem(0, layers=60, candidates=40)
    known = least_largest(costs, errors, limits)[0]
    picks, bound = least_sum_within(costs, errors, limits, 2.0, known)
    value = p_norm(np.array([e[i] for e, i in zip(errors, picks, strict=True)]), 2.0)
    assert bound <= value < 1.01 * bound
    assert value < p_norm(np.array([e[i] for e, i in zip(errors, known, strict=True)]), 2.0)


def test_a_budget_that_does_not_bind_changes_nothing():
    costs, errors, limits = problem(3, layers=30, candidates=20)
    loose = np.array([limits[0], 10**9])
    single = [c[:1] for c in costs]
    one = least_sum_within(single, errors, limits[:1], 2.0, least_largest(single, errors, limits[:1])[0])
    both = least_sum_within(costs, errors, loose, 2.0, least_largest(costs, errors, loose)[0])
    norms = [p_norm(np.array([e[i] for e, i in zip(errors, r[0], strict=True)]), 2.0) for r in (one, both)]
    assert norms[1] == pytest.approx(norms[0], rel=0.01) and both[1] == pytest.approx(one[1], rel=1e-3)


def test_everything_fits():
    costs, errors, limits = problem(1)
    dense = np.array([len(e) - 1 for e in errors])
    picks, bound = least_sum_within(costs, errors, limits * 100, 2.0, dense)
    assert (picks == dense).all() and bound == 0.0
