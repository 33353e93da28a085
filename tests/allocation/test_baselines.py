"""Every baseline against its paper's formula, by hand; feasible, and never better than the exact allocation."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import count, images, small_net
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import alds_fast as alds
from alds_fast.allocation import Candidates
from alds_fast.allocation.baselines.pca import pca_ranks
from alds_fast.allocation.baselines.registry import BASELINES
from alds_fast.allocation.baselines.rules import Chain, common_level, least_sum, pca_on, uniform
from alds_fast.allocation.candidates import Curve
from alds_fast.errors import ArgumentError, BudgetError
from alds_fast.planning import METHODS

WITHOUT_DATA = [method for method in METHODS if method not in ("alds", "pca")]


def diagonal(*layers):
    """Linear layers without bias of (channels, filters, singular values)."""
    model = nn.Sequential(*(nn.Linear(c, f, bias=False) for c, f, _ in layers))
    for module, (_, _, values) in zip(model, layers, strict=True):
        module.weight.data.zero_().diagonal()[: len(values)] = torch.tensor(values, dtype=torch.float32)
    return model


# A: 64 weights, 16 a rank, so ranks 1..3 save; B: 96, 20 a rank, 1..4; C: 48, 16 a rank, 1 and 2. 208 in all.
BY_HAND = ((8, 8, (4, 2, 1, 1, 1, 1)), (8, 12, (5, 3, 2, 1)), (12, 4, (6, 3, 1, 0.5)))


@pytest.fixture(scope="module")
def by_hand():
    return alds.analyze(diagonal(*BY_HAND))


# svd: full ranks 8, 8, 4. rho = 1/8: ranks 1, 1, max(1, 0), cost 52. 2/8: 2, 2, 1, 88. 3/8: 3, 3, 1, 124.
#   4/8: A's 4 ranks would cost 64 = dense, so 64 + 80 + 32 = 176.
# svd-energy: shares kept by ranks 1, 2, ...: A 16/24 = .667, .833, .875; B 25/39 = .641, .872, .974; C 36/46.25 =
#   .778, .973. Share .641: 1, 1, 1, 52. .667: 1, 2, 1, 72. .778: 2, 2, 1, 88. .833: 2, 2, 2, 104.
#   .872: 3, 2, 2, 120. .875: 3, 3, 2, 140.
# svd-nuclear: A 4/10 = .4, .6, .7, .8; B 5/11 = .455, .727, .909; C 6/10.5 = .571, .857. Share .4: 1, 1, 1, 52.
#   .455: 2, 1, 1, 68. .571: 2, 2, 1, 88. .6: 2, 2, 2, 104. .7: 3, 2, 2, 120. .727: A needs 4, dense, 136.
# l-rank: squared errors at ranks 1, 2, ..., dense: A 8, 4, 3, 0 at 16, 32, 48, 64; B 14, 5, 1, 0 at 20, 40, 60, 80;
#   C 10.25, 1.25, 0 at 16, 32, 48. Falls per cost on the hulls: C 9/16 = .563; B 9/20 = .45; A 4/16 = .25; B 4/20 = .2;
#   A 4/32 = .125, passing by rank 3; C 1.25/16 = .078; B 1/20. From 52 that costs 68, 88, 104, 124, 156, ...
@pytest.mark.parametrize(
    ("method", "budget", "ranks", "cost"),
    [
        ("svd", 124, (3, 3, 1), 124),
        ("svd", 123, (2, 2, 1), 88),
        ("svd", 176, (None, 4, 2), 176),
        ("svd-energy", 124, (3, 2, 2), 120),
        ("svd-energy", 119, (2, 2, 2), 104),
        ("svd-energy", 74, (1, 2, 1), 72),
        ("svd-nuclear", 74, (2, 1, 1), 68),
        ("svd-nuclear", 130, (3, 2, 2), 120),
        ("svd-nuclear", 136, (None, 2, 2), 136),
        ("l-rank", 74, (1, 1, 2), 68),
        ("l-rank", 124, (2, 3, 2), 124),
        ("l-rank", 155, (2, 3, 2), 124),
        ("l-rank", 156, (None, 3, 2), 156),
    ],
)
def test_ranks_by_hand(by_hand, method, budget, ranks, cost):
    plan = by_hand.plan(params=budget / 208, method=method)
    assert tuple(row.rank for row in plan.layers) == ranks and plan.params == cost
    assert {(row.scheme, row.groups) for row in plan.layers if row.rank} == {(0, 1)}


@pytest.mark.parametrize("method", ["svd", "svd-energy", "svd-nuclear", "l-rank"])
def test_the_smallest_reachable_share_is_named(by_hand, method):
    with pytest.raises(
        BudgetError, match=rf"params=0.249 cannot be met by method='{method}': the smallest .* 52 of 208"
    ):
        by_hand.plan(params=0.249, method=method)
    assert by_hand.plan(params=0.25, method=method).params == 52


def test_operations_are_another_budget():
    """The stride makes the encoder of rank j cost 4 per place of 4 x 4, the dense layer as much as before."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(4, 16, 3, 2, 1, bias=False), nn.Linear(4, 64, bias=False)),
        torch.ones(1, 4, 8, 8),
    )
    analysis = alds.analyze(model)
    # Conv: 576 weights at 16 places, 36 + 16 a rank. Linear: 256 weights at 64 places (16 filters x 4 rows), 68 a rank.
    # In multiplications: 9216 and 832 a rank, 16384 and 4352 a rank; full ranks 16 and 4. rho = 1/4: ranks 4 and 1,
    # 3328 + 4352 = 7680, 0.3 of 25600. rho = 5/16: 4160 + 4352 = 8512, 0.3325.
    assert [row.rank for row in analysis.plan(flops=0.3, example_inputs=x, method="svd").layers] == [4, 1]
    assert [row.rank for row in analysis.plan(flops=0.3325, example_inputs=x, method="svd").layers] == [5, 1]


def test_aligned_ranks(by_hand):
    # Full ranks 8, 8, 4; of 4 only B's rank 4 saves (80 of 96). rho < 1/2: that; from 1/2 on B has 4, then 8 at 1.
    plan = by_hand.plan(params=192 / 208, method="svd", align=4)
    assert [row.rank for row in plan.layers] == [None, 4, None]
    # Of 2: A 2 (32), dense; B 2, 4; C 2 (32), dense. Shares kept: A .833, then dense; B .872, 1; C .973.
    # Share .833: 32 + 40 + 32 = 104. .872: A dense, 136. .973: B 4, 176. 1: C dense, 192.
    for budget, ranks in ((135, [2, 2, 2]), (136, [None, 2, 2]), (191, [None, 4, 2]), (192, [None, 4, None])):
        plan = by_hand.plan(params=budget / 208, method="svd-energy", align=2)
        assert [row.rank for row in plan.layers] == ranks


def test_uniform_by_hand():
    first = Curve(0, 1, 1, np.array([10, 20, 30]), np.array([0.9, 0.5, 0.4]))
    sliced = Curve(0, 2, 1, np.array([15, 30]), np.array([0.6, 0.3]))
    second = Curve(0, 1, 1, np.array([20, 40]), np.array([0.7, 0.2]))
    layers = [Candidates((first, sliced), 100), Candidates((second,), 50)]
    # Shares of the own cost: .1, .15 (sliced), .2, .3 (sliced: less error at 30) and 1; .4, .8 and 1. The second
    # layer's cheapest costs 20 even at smaller shares. Share .2: 20 + 20. .3, .4: 30 + 20. .8: 30 + 40. 1: 150.
    for budget, picks in ((30, [0, 0]), (40, [1, 0]), (49, [1, 0]), (69, [4, 0]), (75, [4, 1]), (150, [5, 2])):
        assert uniform(layers, [], budget) == picks
    with pytest.raises(BudgetError, match="a cost of 29 cannot be met; the smallest reachable one is 30"):
        uniform(layers, [], 29)


def test_sum_by_hand(by_hand):
    # Squares .64, .09, 0 at 1, 2, 4 and .81, .25, .16, 0 at 1, 2, 3, 5. Of 5: (2, 3) .25, (4, 1) .81, (1, 3) .80.
    first, second = (
        Curve(0, 1, 1, np.arange(1, n + 1), np.array(e)) for n, e in ((2, [0.8, 0.3]), (3, [0.9, 0.5, 0.4]))
    )
    layers = [Candidates((first,), 4), Candidates((second,), 5)]
    assert least_sum(layers, [], 5) == [1, 2] and least_sum(layers, [], 2) == [0, 0]
    plan, other = by_hand.plan(params=0.5, method="sum"), by_hand.plan(params=0.5, p=2)
    assert plan.layers == other.layers and plan.p == np.inf


def test_pca_by_hand():
    # Scores, decrease / kept / cost: first layer rank 4: 2/16/10 = .0125, 3: 2/14/10 = .0143, 2: 4/12/10 = .0333;
    # second 3: 1/10/30 = .0033, 2: 3/9/30 = .0111. Dense where that is cheaper: 35 + 80. In that order the removals
    # leave 35 + 60, 35 + 30, 30 + 30, 20 + 30, 10 + 30.
    problem = [np.array([8.0, 4, 2, 2]), np.array([6.0, 3, 1])], [10, 30], [35, 80]
    for budget, ranks in (
        (115, [4, 3]),
        (114, [4, 2]),
        (95, [4, 2]),
        (94, [4, 1]),
        (64, [3, 1]),
        (59, [2, 1]),
        (40, [1, 1]),
    ):
        assert pca_ranks(*problem, budget) == ranks
    with pytest.raises(BudgetError, match="a cost of 39 cannot be met; the smallest reachable one is 40"):
        pca_ranks(*problem, 39)
    assert pca_ranks([], [], [], 0) == []


def test_pca_on_candidates():
    def layer(align, costs, dense):
        return Candidates((Curve(0, 1, align, np.array(costs), np.zeros(len(costs))),), dense)

    eigenvalues = [np.array([8.0, 4, 2, 2]), np.array([6.0, 3, 1])]
    layers = [layer(1, [10, 20, 30], 35), layer(1, [30, 60], 80)]
    assert pca_on(layers, eigenvalues, 114) == [3, 1] and pca_on(layers, eigenvalues, 59) == [1, 0]
    # Pairs: 12 and 4 at 20 a pair, 9 and 1 at 60. Second pairs: 4/16/20 = .0125, 1/10/60 = .0017. 35 + 80, 35 + 60.
    layers = [layer(2, [20], 35), layer(2, [60], 80)]
    assert pca_on(layers, eigenvalues, 114) == [1, 0] and pca_on(layers, eigenvalues, 94) == [0, 0]
    assert pca_on([Candidates((), 7)], [np.ones(3)], 7) == [0]


positive = st.integers(1, 30)
spectra = st.lists(st.integers(0, 20), min_size=1, max_size=5).map(lambda v: np.array(sorted(v, reverse=True), float))


def _greedy(values, costs, dense, budget):
    """As the paper says it, one eigenvalue after the other."""
    ranks = [len(v) for v in values]
    while sum(min(r * c, d) for r, c, d in zip(ranks, costs, dense, strict=True)) > budget:
        scores = [
            (v[r - 1] / v[:r].sum() if v[:r].any() else 0.0) / c if r > 1 else np.inf
            for v, r, c in zip(values, ranks, costs, strict=True)
        ]
        ranks[int(np.argmin(scores))] -= 1
    return ranks


@given(st.lists(st.tuples(spectra, positive, positive), max_size=4), st.integers(0, 100))
def test_pca_is_the_greedy_removal(layers, percent):
    values, costs, dense = ([layer[i] for layer in layers] for i in range(3))
    low, high = (sum(min(n * c, d) for n, c, d in zip(sizes, costs, dense, strict=True))
                 for sizes in ([1] * len(values), map(len, values)))  # fmt: skip
    budget = low + (high - low) * percent // 100
    assert pca_ranks(values, costs, dense, budget) == _greedy(values, costs, dense, budget)


chains = st.lists(st.tuples(st.integers(0, 9), positive), min_size=1, max_size=5).map(
    lambda points: Chain(
        np.sort(np.array([level for level, _ in points], float)),
        np.cumsum([cost for _, cost in points]),
        np.arange(len(points)),
    )
)


@given(st.lists(chains, max_size=4), st.integers(0, 400))
def test_the_common_level_is_the_largest_that_fits(problem, budget):
    def at(level):
        return [max([i for i, start in enumerate(c.levels) if start <= level], default=0) for c in problem]

    def cost(points):
        return sum(int(c.costs[i]) for c, i in zip(problem, points, strict=True))

    fitting = [at(level) for level in range(-1, 10) if cost(at(level)) <= budget]
    if fitting:
        assert common_level(problem, budget) == fitting[-1]
    else:
        with pytest.raises(BudgetError):
            common_level(problem, budget)


@st.composite
def models(draw):
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        channels, filters = draw(st.sampled_from([4, 6, 8, 12])), draw(st.integers(4, 12))
        values = draw(st.lists(st.integers(0, 9), max_size=min(channels, filters)))
        layers.append((channels, filters, [float(v) for v in values]))
    return diagonal(*layers)


@pytest.mark.slow
@settings(max_examples=40)
@given(models(), st.integers(1, 100), st.sampled_from([1, 2]), st.sampled_from(["frobenius", "operator"]))
def test_never_over_budget_and_never_better_than_exact(model, percent, align, criterion):
    analysis = alds.analyze(model)
    for method in WITHOUT_DATA:
        options = {"params": percent / 100, "criterion": criterion, "align": align}
        try:
            plan = analysis.plan(method=method, **options)
        except BudgetError as e:
            named = re.search(r"smallest reachable is params=([\d.]+)", str(e))
            if named:  # the heuristic may find nothing where something exists, and says so
                assert float(named[1]) > percent / 100
                if method != "alds-heuristic":
                    assert analysis.plan(**{**options, "params": float(named[1])}, method=method).params > 0
            assert named or method == "alds-heuristic"
            continue
        exact = analysis.plan(**options, pivots=False)
        assert plan.params <= percent / 100 * analysis.params + 1e-9 and exact.error <= plan.error
        assert plan.gap == pytest.approx(plan.error / exact.error - 1 if exact.error else np.inf if plan.error else 0.0)
        assert all(row.params_after <= row.params_before for row in plan.layers)
        assert count(plan.apply(model)) == plan.params


@pytest.mark.parametrize("method", WITHOUT_DATA)
@pytest.mark.parametrize("align", [1, 4])
def test_convolutions_under_budgets_on_operations(method, align):
    model = small_net()
    analysis = alds.analyze(model)
    plan = analysis.plan(flops=0.6, example_inputs=images(), method=method, align=align)
    exact = analysis.plan(flops=0.6, example_inputs=images(), align=align, p=math.inf, pivots=False)
    with FlopCounterMode(display=False) as dense:
        model(images())
    with FlopCounterMode(display=False) as counter:
        plan.apply(model)(images())
    assert counter.get_total_flops() <= 0.6 * dense.get_total_flops() and exact.error <= plan.error
    assert all(row.rank is None or row.rank % align == 0 for row in plan.layers)


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_errors_of_the_plan_are_those_of_the_criterion(method):
    model = small_net().double()
    plan = alds.analyze(model).plan(params=0.5, method=method)
    small = plan.apply(model)
    for row in plan.layers:
        if row.rank is not None:
            dense = model[int(row.name)].weight
            error = ((small[int(row.name)].dense_weight() - dense).norm() / dense.norm()).detach()
            assert float(error) == pytest.approx(row.error, rel=1e-3)
    reread = alds.Plan.from_json(plan.to_json())
    assert reread == plan and torch.equal(reread.apply(model)(images().double()), small(images().double()))
    criteria = [alds.analyze(model).plan(params=0.5, method=method, criterion=c) for c in ("operator", "paper")]
    if BASELINES[method].one_slice:  # the choice is theirs, and for one slice both errors are the same
        assert [r.rank for r in criteria[0].layers] == [r.rank for r in plan.layers]
        assert (
            [r.error for r in criteria[0].layers]
            == [r.error for r in criteria[1].layers]
            != [r.error for r in plan.layers]
        )


def test_names_and_sources():
    assert ("alds", *BASELINES) == METHODS
    assert [name for name, b in BASELINES.items() if b.one_slice] == [
        "svd",
        "svd-energy",
        "svd-nuclear",
        "l-rank",
        "pca",
    ]
    assert all(f"``{name}``" in (b.rule.__doc__ or "") for name, b in BASELINES.items())


def test_layers_without_a_saving_rank_and_models_without_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(16, 16))  # one rank of the first costs as much as it has weights
    torch.nn.init.zeros_(model[1].weight)
    for method in WITHOUT_DATA:
        plan = alds.analyze(model).plan(params=0.5, method=method)
        # Of 278 parameters 22 stay; (139 - 22) // 32 = 3 ranks fit, and only svd does not look at the values.
        assert [row.rank for row in plan.layers] == [None, 3 if method == "svd" else 1] and plan.error == 0.0
        assert alds.analyze(nn.ReLU()).plan(params=0.5, method=method).layers == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": 0.5, "flops": 0.5}, "method='svd' needs params=, flops= or memory=, one alone"),
        ({"latency": 0.5}, "method='svd' needs params=, flops= or memory=, one alone"),
        ({"error": 0.5}, "method='svd' needs params=, flops= or memory=, one alone"),
        ({"params": 0.5, "p": 2}, "p=2 applies to budgets .* with method='alds' only"),
        ({"params": 0.5, "method": "pca"}, r"method='pca' needs data: analyze"),
    ],
)
def test_what_baselines_refuse(by_hand, options, message):
    with pytest.raises(ArgumentError, match=message):
        by_hand.plan(**{"method": "svd", "example_inputs": torch.ones(1, 8), **options})


@pytest.mark.parametrize("method", ["svd", "l-rank"])
@pytest.mark.parametrize("options", [{"groups": (2,)}, {"schemes": (3,)}])
def test_folds_that_were_not_analysed(method, options):
    analysis = alds.analyze(nn.Conv2d(4, 8, 3), **options)
    with pytest.raises(ArgumentError, match=f"method='{method}' uses scheme 0 with one slice.* 0 in schemes= and 1 in"):
        analysis.plan(params=0.5, method=method)
    assert analysis.plan(params=0.5, method="uniform").keep_ratio <= 0.5
