"""The allocator against brute force and against an independent enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import alds_fast as alds
from alds_fast.allocation import Front, one_budget, pareto, pareto_front
from alds_fast.errors import BudgetError
from benchmarks.common.networks import resnet_shaped


@st.composite
def problems(draw):
    """Up to four fronts of up to six points, ties in cost and error included, and a budget that can be met."""
    fronts = []
    for _ in range(draw(st.integers(1, 4))):
        dense = draw(st.integers(2, 25))
        points = draw(st.lists(st.tuples(st.integers(1, dense - 1), st.integers(1, 9)), max_size=5))
        costs = np.array([c for c, _ in points] + [dense])
        errors = np.array([e / 10 for _, e in points] + [0.0])
        fronts.append(pareto_front(costs, errors))
    low, high = (sum(int(f.costs[i]) for f in fronts) for i in (0, -1))
    return fronts, draw(st.integers(low, high))


def _feasible(fronts, budget):
    for picks in itertools.product(*(range(len(f.costs)) for f in fronts)):
        if pareto.total_cost(fronts, picks) <= budget:
            yield np.array(picks)


@given(problems())
def test_minimax_equals_brute_force_lexicographically(problem):
    fronts, budget = problem
    solution = one_budget.minimax(fronts, budget)
    errors = pareto.errors_of(fronts, solution.picks)
    profiles = [sorted(pareto.errors_of(fronts, p), reverse=True) for p in _feasible(fronts, budget)]
    assert pareto.total_cost(fronts, solution.picks) <= budget
    assert errors.max() == solution.bound == min(p[0] for p in profiles)
    positive = np.concatenate([f.errors[:-1] for f in fronts])
    if np.unique(positive).size == positive.size:  # with equal errors in two layers either may be improved first
        assert sorted(errors, reverse=True) == min(profiles)


@given(problems(), st.sampled_from([1.0, 2.0, 4.0, 8.0, 50.0, 1e3, 1e5]))
def test_least_p_norm_is_within_its_certified_gap_of_brute_force(problem, p):
    fronts, budget = problem
    solution = one_budget.allocate(fronts, budget, p)
    value = pareto.p_norm(pareto.errors_of(fronts, solution.picks), p)
    best = min(pareto.p_norm(pareto.errors_of(fronts, q), p) for q in _feasible(fronts, budget))
    gap = one_budget.gap(fronts, solution.picks, solution.bound, p)
    assert pareto.total_cost(fronts, solution.picks) <= budget
    assert solution.bound <= best * (1 + 1e-9) + 1e-12
    assert best <= value * (1 + 1e-12) and value <= best * (1 + gap) * (1 + 1e-9)


@given(problems())
def test_no_affordable_improvement_is_left(problem):
    fronts, budget = problem
    for p in (math.inf, 2.0, 1e4):
        picks = one_budget.allocate(fronts, budget, p).picks
        unspent = budget - pareto.total_cost(fronts, picks)
        for front, i in zip(fronts, picks, strict=True):
            assert i == len(front.costs) - 1 or front.costs[i + 1] - front.costs[i] > unspent


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_pareto_front_keeps_exactly_the_undominated(points):
    costs, errors = np.array([c for c, _ in points]), np.array([e / 10 for _, e in points])
    front = pareto_front(costs, errors)
    pairs = set(zip(costs, errors, strict=True))
    undominated = {(c, e) for c, e in pairs if not any(d <= c and f <= e and (d, f) != (c, e) for d, f in pairs)}
    assert list(zip(front.costs, front.errors, strict=True)) == sorted(undominated)
    assert np.array_equal(costs[front.index], front.costs) and np.array_equal(errors[front.index], front.errors)


@given(problems(), st.integers(0, 10))
def test_threshold_takes_the_cheapest(problem, tenths):
    fronts, _ = problem
    for front, i in zip(fronts, pareto.threshold(fronts, tenths / 10), strict=True):
        assert front.errors[i] <= tenths / 10 and (i == 0 or front.errors[i - 1] > tenths / 10)


def test_unreachable_budget_names_the_smallest():
    front = Front(np.array([5, 9]), np.array([0.5, 0.0]), np.array([0, 1]))
    with pytest.raises(BudgetError, match="9 cannot be met; the smallest reachable one is 10"):
        one_budget.minimax([front, front], 9)


def test_nothing_to_allocate():
    for p in (math.inf, 2.0):
        assert one_budget.allocate([], 0, p).picks.size == 0


def test_zero_and_low_rank_layers_do_not_eat_the_budget():
    """Their fronts end before the dense layer, at the cheapest candidate without error."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    torch.nn.init.zeros_(model[1].weight)
    for method in ("alds", "alds-heuristic"):
        plan = alds.analyze(model).plan(params=0.6, method=method)
        assert plan.keep_ratio <= 0.6 and plan.error == 0.0
    assert alds.compress(model[1], params=0.5).rank == 1


def test_p_norm_does_not_underflow():
    assert pareto.p_norm(np.array([1e-200, 1e-200]), 4) == pytest.approx(2**0.25 * 1e-200)


@pytest.fixture(scope="module")
def resnet18():
    return resnet_shaped([2, 2, 2, 2], bottleneck=False)


def _enumerated_optimum(model, keep):
    """Least largest Frobenius error of scheme 0 by plain enumeration of all thresholds, from torch's own SVD."""
    layers, fixed = [], sum(p.numel() for p in model.parameters())
    for module in model:
        w = module.weight.detach().double().flatten(1)
        filters, dense = w.shape[0], w.numel()
        fixed -= dense
        channels = module.weight.shape[1]
        table = [(0.0, dense)]
        for k in (k for k in range(1, channels + 1) if channels % k == 0):
            slices = w.unflatten(1, (k, -1)).transpose(0, 1)
            gram = slices @ slices.mT if slices.shape[1] <= slices.shape[2] else slices.mT @ slices
            squares = torch.linalg.eigvalsh(gram).clamp_min(0).flip(1).sum(0)
            tail = (squares.sum() - squares.cumsum(0)).clamp_min(0)
            errors = (tail / squares.sum()).sqrt().tolist()
            table += [(e, (j + 1) * (k * filters + w.shape[1])) for j, e in enumerate(errors)]
            if k == 1:  # output pivots, an index for every filter
                table += [(e, r * (filters + w.shape[1] - r) + filters) for r, e in enumerate(errors[:-1], 1)]
            elif isinstance(module, nn.Linear):  # input pivots, an index for every feature
                costs = [(e, r * (k * filters + w.shape[1] - k * r) + w.shape[1]) for r, e in enumerate(errors, 1)]
                table += [row for r, row in enumerate(costs, 1) if r * k < w.shape[1]]
        layers.append(np.array([row for row in table if row[1] < dense or row[0] == 0.0]))
    budget = math.floor(keep * sum(p.numel() for p in model.parameters())) - fixed
    for t in np.unique(np.concatenate([rows[:, 0] for rows in layers])):
        if sum(rows[rows[:, 0] <= t, 1].min() for rows in layers) <= budget:
            return t
    return None


@pytest.mark.slow
def test_plan_equals_an_independent_enumeration_on_resnet18(resnet18):
    analysis = alds.analyze(resnet18, schemes=(0,))
    for keep in (0.3, 0.7):
        plan = analysis.plan(params=keep, p=np.inf)
        assert plan.error == pytest.approx(_enumerated_optimum(resnet18, keep), abs=1e-9)
        assert plan.gap == 0.0 and plan.params <= keep * analysis.params


@pytest.mark.slow
def test_the_papers_heuristic_is_never_better(resnet18):
    analysis = alds.analyze(resnet18)
    for keep in (0.2, 0.5, 0.8):
        exact = analysis.plan(params=keep, p=np.inf, pivots=False)
        heuristic = analysis.plan(params=keep, method="alds-heuristic", p=np.inf)
        assert heuristic.params <= keep * analysis.params
        assert exact.error <= heuristic.error
        assert heuristic.gap == pytest.approx(heuristic.error / exact.error - 1)
        assert heuristic.method == "alds-heuristic"
