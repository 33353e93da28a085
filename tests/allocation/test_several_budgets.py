"""Several budgets at once, against brute force."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from alds_fast.allocation import one_budget, pareto, several_budgets


@st.composite
def problems(draw, kinds=(2, 3)):
    """Up to four layers of up to six candidates, the last one dense, with two or three costs each, and budgets."""
    kinds = draw(st.sampled_from(kinds))
    costs, errors = [], []
    for _ in range(draw(st.integers(1, 4))):
        number = draw(st.integers(1, 6))
        rows = [draw(st.lists(st.integers(0, 20), min_size=number, max_size=number)) for _ in range(kinds)]
        costs.append(np.array(rows, dtype=np.int64))
        tenths = draw(st.lists(st.integers(1, 9), min_size=number - 1, max_size=number - 1))
        errors.append(np.array([*tenths, 0]) / 10)
    limits = [draw(st.integers(0, sum(int(c[k].max()) for c in costs))) for k in range(kinds)]
    return costs, errors, np.array(limits, dtype=np.int64)


def _feasible(costs, limits):
    for picks in itertools.product(*(range(c.shape[1]) for c in costs)):
        if (sum(c[:, i] for c, i in zip(costs, picks, strict=True)) <= limits).all():
            yield picks


def _errors(errors, picks):
    return [e[i] for e, i in zip(errors, picks, strict=True)]


@given(problems())
def test_bound_and_budgets_against_brute_force(problem):
    costs, errors, limits = problem
    largest = [max(_errors(errors, picks)) for picks in _feasible(costs, limits)]
    solution = several_budgets.least_largest(costs, errors, limits)
    if not largest:
        assert solution is None
    elif solution is not None:
        picks, bound = solution
        assert tuple(picks) in set(_feasible(costs, limits))
        assert bound <= min(largest) <= max(_errors(errors, picks))


@given(problems())
def test_no_affordable_improvement_is_left(problem):
    costs, errors, limits = problem
    solution = several_budgets.least_largest(costs, errors, limits)
    for layer in range(len(costs) if solution else 0):
        for other in range(costs[layer].shape[1]):
            picks = list(solution[0])
            if errors[layer][other] < errors[layer][picks[layer]]:
                picks[layer] = other
                used = sum(c[:, i] for c, i in zip(costs, picks, strict=True))
                assert not (used <= limits).all()


@given(problems(kinds=(1,)))
def test_one_budget_gives_what_the_exact_solver_gives(problem):
    costs, errors, limits = problem
    fronts = [pareto.pareto_front(c[0], e) for c, e in zip(costs, errors, strict=True)]
    solution = several_budgets.least_largest(costs, errors, limits)
    if solution is None:
        assert sum(int(f.costs[0]) for f in fronts) > limits[0]
    else:
        exact = one_budget.minimax(fronts, int(limits[0]))
        assert max(_errors(errors, solution[0])) == solution[1] == exact.bound


@given(problems())
def test_the_least_budget_found_can_be_met(problem):
    costs, errors, limits = problem
    limits[0] = 10**6
    if not list(_feasible(costs, limits)):
        return
    least = several_budgets.least_budget(costs, errors, limits, 0)
    limits[0] = least
    assert several_budgets.least_largest(costs, errors, limits) is not None


def _curves(layers, seed=0):
    """Layers as they are: curves of falling errors whose two costs are proportional to the rank in different ways."""
    rng = np.random.default_rng(seed)
    costs, errors = [], []
    for _ in range(layers):
        dense = rng.integers(1000, 100_000, 2)
        ranks, rows = np.arange(1, 100), [[], []]
        tails = []
        for _ in range(4):
            for k in range(2):
                rows[k].append((dense[k] * ranks * rng.uniform(0.008, 0.03)).astype(np.int64))
            tails.append(np.exp(-ranks * rng.uniform(0.01, 0.1)))
        costs.append(np.stack([np.append(np.concatenate(r), d) for r, d in zip(rows, dense, strict=True)]))
        errors.append(np.append(np.concatenate(tails), 0.0))
    return costs, errors


def test_the_gap_is_small_where_there_are_many_layers():
    costs, errors = _curves(40)
    dense = sum(c[:, -1] for c in costs)
    for shares in ((0.5, 0.4), (0.3, 0.3), (0.2, 0.8)):
        limits = (dense * shares).astype(np.int64)
        picks, bound = several_budgets.least_largest(costs, errors, limits)
        assert (sum(c[:, i] for c, i in zip(costs, picks, strict=True)) <= limits).all()
        assert bound <= max(_errors(errors, picks)) <= 1.02 * bound
