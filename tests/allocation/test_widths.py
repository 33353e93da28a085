"""Numbers of hidden units at one price, against brute force."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from alds_fast.allocation import Width, pareto_front, widths_at_one_price


@st.composite
def fronts(draw, most=6):
    points = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=most))
    return pareto_front(np.array([c for c, _ in points]), np.array([e / 10 for _, e in points]))


width = st.builds(Width, st.integers(0, 50).map(lambda n: n / 100), st.lists(fronts(3), min_size=1, max_size=2))
group = st.lists(width, min_size=1, max_size=3)


def least(front, price):
    """Of squared error and price times cost the least sum, and the least and largest cost that has it."""
    sums = front.errors**2 + price * front.costs
    best = front.costs[sums <= sums.min() + 1e-12]
    return float(sums.min()), int(best.min()), int(best.max())


@given(st.lists(fronts(3), max_size=2), st.lists(group, min_size=1, max_size=2), st.integers(0, 120))
def test_least_at_the_lowest_price_that_fits(others, groups, budget):
    picks, price = widths_at_one_price(others, groups, budget)

    def sums(price):
        """By all combinations of widths: what is least at a price, its least and its largest cost."""
        for chosen in itertools.product(*(range(len(group)) for group in groups)):
            taken = [group[at] for group, at in zip(groups, chosen, strict=True)]
            of = [least(front, price) for front in (*others, *(f for width in taken for f in width.fronts))]
            yield (
                list(chosen),
                sum(x[0] for x in of) + sum(w.square for w in taken),
                [sum(x[i] for x in of) for i in (1, 2)],
            )

    found = list(sums(price))
    best = min(total for _, total, _ in found)
    own = next(of for of in found if of[0] == picks)
    assert own[1] <= best + 1e-9 * (1 + best)
    if own[2][0] > budget:  # nothing fits: what is cheapest
        assert own[2][0] == min(costs[0] for _, _, costs in sums(1e9))
        return
    cheaper = list(sums(price * (1 - 1e-6)))
    below = min(total for _, total, _ in cheaper)
    dear = max(costs[1] for _, total, costs in cheaper if total <= below + 1e-9 * (1 + below))
    assert dear > budget or price < 1e-20


def test_all_units_stay_where_there_is_room():
    front = pareto_front(np.array([5, 10]), np.array([0.5, 0.0]))
    less = pareto_front(np.array([3, 6]), np.array([0.5, 0.0]))
    group = [Width(0.0, [front]), Width(0.01, [less])]
    assert widths_at_one_price([front], [group], 20)[0] == [0]
    assert widths_at_one_price([front], [group], 16)[0] == [1]
