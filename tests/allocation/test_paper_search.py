import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alds_fast.allocation import Candidates, one_budget
from alds_fast.allocation.baselines import paper_search
from alds_fast.allocation.baselines.paper_search import alds_heuristic
from alds_fast.allocation.candidates import Curve
from alds_fast.errors import BudgetError


@st.composite
def layers(draw):
    drawn = []
    for _ in range(draw(st.integers(1, 4))):
        dense, curves = draw(st.integers(4, 40)), []
        for groups in (1, 2):
            slope = draw(st.integers(1, 6))
            count = min(draw(st.integers(0, 6)), (dense - 1) // slope)
            errors = sorted(draw(st.lists(st.integers(1, 99), min_size=count, max_size=count)), reverse=True)
            if count:
                curves.append(Curve(0, groups, 1, slope * np.arange(1, count + 1), np.array(errors) / 100))
        drawn.append(Candidates(tuple(curves), dense))
    return drawn


@given(layers(), st.integers(0, 100))
def test_alds_heuristic_is_feasible_and_never_better_than_exact(problem, percent):
    fronts = [layer.front() for layer in problem]
    low, high = (sum(int(f.costs[i]) for f in fronts) for i in (0, -1))
    budget = low + (high - low) * percent // 100
    try:
        picks = alds_heuristic(problem, budget)
    except BudgetError:
        return  # a heuristic may find nothing where something exists
    assert sum(int(layer.costs[i]) for layer, i in zip(problem, picks, strict=True)) <= budget
    worst = max(float(layer.errors[i]) for layer, i in zip(problem, picks, strict=True))
    assert worst >= one_budget.minimax(fronts, budget).bound


def test_alds_heuristic_says_when_nothing_fits():
    with pytest.raises(BudgetError, match="alds-heuristic found no allocation with a cost of at most 1"):
        alds_heuristic([Candidates((), 5)], 1)


def test_candidates_know_their_choice():
    curves = Curve(0, 1, 8, np.array([16, 32]), np.array([0.5, 0.2])), Curve(3, 2, 8, np.array([20]), np.array([0.3]))
    layer = Candidates(curves, 64)
    assert [layer.decomposition(i) for i in range(4)] == [(0, 1, 8, ""), (0, 1, 16, ""), (3, 2, 8, ""), None]
    assert layer.front().index.tolist() == [0, 2, 1, 3]


def test_alds_heuristic_by_hand():
    """Two layers of dense cost 100, budget 80, each with two curves; every start comes to the same end.

    Step 1 gives both layers their least common error at the curves they have, step 2 moves each to the curve with the
    least error at its cost: curve 1 of layer 0 (at cost 40: .3 against .5), curve 0 of layer 1 (.2 against .6).
    """
    costs = np.array([20, 40, 60])
    good, bad = np.array([0.5, 0.3, 0.1]), np.array([0.7, 0.5, 0.4])
    better, worse = np.array([0.4, 0.2, 0.1]), np.array([0.8, 0.6, 0.5])
    layers = [
        Candidates((Curve(0, 1, 1, costs, bad), Curve(0, 2, 1, costs, good)), 100),
        Candidates((Curve(0, 1, 1, costs, better), Curve(0, 2, 1, costs, worse)), 100),
    ]
    picks = alds_heuristic(layers, 80)
    assert [layer.decomposition(i) for layer, i in zip(layers, picks, strict=True)] == [(0, 2, 2, ""), (0, 1, 2, "")]


@pytest.mark.slow
def test_alds_heuristic_keeps_the_best_start():
    """Starts that end at different errors: the least one counts."""
    different = 0
    for seed in range(40):
        rng, layers = np.random.default_rng(seed), []
        for _ in range(3):
            curves = [
                Curve(0, k, 1, slope * np.arange(1, 8), np.sort(rng.uniform(size=7))[::-1].copy())
                for k, slope in ((1, 5), (2, 7), (4, 9))
            ]
            layers.append(Candidates(tuple(curves), 70))
        ends = [paper_search._search(layers, 90, np.random.default_rng(start)) for start in range(paper_search.SEEDS)]
        errors = [end[1] for end in ends if end is not None]
        picks = alds_heuristic(layers, 90)
        assert max(float(la.errors[i]) for la, i in zip(layers, picks, strict=True)) == min(errors)
        different += max(errors) > min(errors)
    assert different >= 10
