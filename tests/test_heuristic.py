import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alds_fast import allocate
from alds_fast.candidates import Candidates, Curve
from alds_fast.errors import BudgetError
from alds_fast.heuristic import alds_heuristic


@st.composite
def layers(draw):
    found = []
    for _ in range(draw(st.integers(1, 4))):
        dense, curves = draw(st.integers(4, 40)), []
        for groups in (1, 2):
            slope = draw(st.integers(1, 6))
            count = min(draw(st.integers(0, 6)), (dense - 1) // slope)
            errors = sorted(draw(st.lists(st.integers(1, 99), min_size=count, max_size=count)), reverse=True)
            if count:
                curves.append(Curve(0, groups, 1, slope * np.arange(1, count + 1), np.array(errors) / 100))
        found.append(Candidates(tuple(curves), dense))
    return found


@given(layers(), st.integers(0, 100))
def test_alds_heuristic_is_feasible_and_never_better_than_exact(problem, percent):
    fronts = [layer.front() for layer in problem]
    low, high = (sum(int(f.costs[i]) for f in fronts) for i in (0, -1))
    budget = low + (high - low) * percent // 100
    try:
        found = alds_heuristic(problem, budget)
    except BudgetError:
        return  # a heuristic may find nothing where something exists
    assert sum(int(layer.costs[i]) for layer, i in zip(problem, found, strict=True)) <= budget
    worst = max(float(layer.errors[i]) for layer, i in zip(problem, found, strict=True))
    assert worst >= allocate.minimax(fronts, budget).bound


def test_alds_heuristic_says_when_nothing_fits():
    with pytest.raises(BudgetError, match="alds-heuristic found no allocation with a cost of at most 1"):
        alds_heuristic([Candidates((), 5)], 1)


def test_candidates_know_their_choice():
    curves = Curve(0, 1, 8, np.array([16, 32]), np.array([0.5, 0.2])), Curve(3, 2, 8, np.array([20]), np.array([0.3]))
    layer = Candidates(curves, 64)
    assert [layer.choice(i) for i in range(4)] == [(0, 1, 8), (0, 1, 16), (3, 2, 8), None]
    assert layer.front().index.tolist() == [0, 2, 1, 3]
