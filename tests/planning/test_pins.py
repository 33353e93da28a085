"""Pins hold whatever the budget, and the plan is the best one under them."""

import itertools
import math

import numpy as np
import pytest
import torch
from support.models import count, images, small_net
from torch import nn

import alds_fast as alds
from alds_fast.allocation.candidates import Candidates, Curve
from alds_fast.allocation.costs import params_table
from alds_fast.allocation.pareto import p_norm
from alds_fast.allocation.solver import solve, solve_error
from alds_fast.errors import ArgumentError, BudgetError, LayerNotFoundError, PlanError


@pytest.fixture(scope="module")
def analysis():
    return alds.analyze(small_net())


def _rows(plan):
    return {row.name: row for row in plan.layers}


def _keep(row):
    return row.choice.decomposition.params(row.choice.shape) / row.choice.shape.numel if row.choice else 1.0


BUDGETS = [{"params": 0.75}, {"params": 0.75, "p": math.inf}, {"flops": 0.8}, {"params": 0.8, "flops": 0.8}]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_pins_hold(analysis, budget):
    pins = {"0": "dense", "3": {"min_keep": 0.5}, "5": {"max_rank": 7}, nn.Linear: {"max_keep": 0.6, "min_rank": 2}}
    plan = analysis.plan(**budget, pins=pins, example_inputs=images())
    rows = _rows(plan)
    assert rows["0"].rank is None and rows["0"].reason == "pinned: '0' dense"
    assert _keep(rows["3"]) >= 0.5 and rows["5"].rank <= 7
    assert rows["8"].rank >= 2 and _keep(rows["8"]) <= 0.6
    assert rows["5"].remark == "pinned: '5' max_rank=7" and "pinned: '5' max_rank=7" in str(plan)
    small = plan.apply(small_net())
    assert count(small) == plan.params <= budget.get("params", 1.0) * count(small_net())
    assert isinstance(small[0], nn.Conv2d) and small[5].rank <= 7
    read = alds.Plan.from_json(plan.to_json())
    assert read == plan and read.pins["torch.nn.modules.linear.Linear"] == {"max_keep": 0.6, "min_rank": 2}


def test_without_pins_that_bind_the_plan_is_the_usual_one(analysis):
    usual = analysis.plan(params=0.6)
    pins = {row.name: {"min_rank": row.rank, "max_rank": row.rank} for row in usual.layers if row.rank}
    assert len(pins) >= 2
    pinned = analysis.plan(params=0.6, pins=pins)
    assert [row.choice for row in pinned.layers] == [row.choice for row in usual.layers]


def test_a_pin_to_dense_is_like_excluding_the_layer(analysis):
    pinned = analysis.plan(params=0.9, pins={"3": "dense"})
    excluded = alds.analyze(small_net(), exclude="3").plan(params=0.9)
    assert [row.choice for row in pinned.layers] == [row.choice for row in excluded.layers]
    for method in ("svd-energy", "uniform"):
        chosen = [analysis.plan(params=0.9, pins={"3": "dense"}, method=method),
                  alds.analyze(small_net(), exclude="3").plan(params=0.9, method=method)]  # fmt: skip
        assert chosen[0].layers[1].rank is None and chosen[0].params == chosen[1].params


def test_least_ranks_of_all_layers(analysis):
    plan = analysis.plan(params=0.75, min_rank=12, align=3)
    ranks = [row.rank for row in plan.layers if row.rank]
    assert ranks and min(ranks) >= 12 and all(rank % 3 == 0 for rank in ranks) and plan.min_rank == 12
    assert min(row.rank for row in analysis.plan(params=0.6, align=3).layers if row.rank) < 12
    rows = _rows(analysis.plan(params=1.0, min_rank=30))
    assert rows["8"].reason == "no factorisation with ranks that are 30 at least is smaller"


def _random_layers(rng):
    layers = []
    for _ in range(3):
        curves = []
        for groups, slope in ((1, 5), (2, 3)):
            errors = np.sort(rng.uniform(size=6))[::-1].copy()
            curves.append(Curve(0, groups, 2, slope * np.arange(1, 7), errors))
        layers.append(Candidates(tuple(curves), 40))
    return layers


@pytest.mark.parametrize("seed", range(20))
def test_limited_plans_are_the_best_there_are(seed):
    """By brute force over the candidates that the limits leave, some of them without dense."""
    rng = np.random.default_rng(seed)
    limits = [((4, 10), (0, 40), True), ((2, None), (6, 25), False), ((1, 8), (0, np.inf), False)]
    layers = [layer.limit(*limit) for layer, limit in zip(_random_layers(rng), limits, strict=True)]
    for layer, ((low, high), costs, dense) in zip(layers, limits, strict=True):
        for i, (cost, error) in enumerate(zip(layer.costs, layer.errors, strict=True)):
            taken = layer.decomposition(i)
            assert (taken is None) == (error == 0.0) and (dense or taken is not None)
            assert taken is None or (low <= taken.rank <= (high or 99) and costs[0] <= cost <= costs[1])
            curve = next((c for c in layer.curves if taken and c.groups == taken.groups), None)
            assert taken is None or (cost == (5 if taken.groups == 1 else 3) * taken.rank // 2 and curve.align == 2)
    least, most = (sum(int(f(c.costs)) for c in layers) for f in (min, max))
    share = (least + rng.uniform(0.1, 0.9) * (most - least)) / 120
    table = params_table(layers, 120, share)
    possible = [
        errors for picks in itertools.product(*(range(len(c.costs)) for c in layers))
        if table.cost(picks) <= table.limit
        for errors in [np.array([c.errors[i] for c, i in zip(layers, picks, strict=True)])]
    ]  # fmt: skip
    taken = solve(layers, [table], math.inf).picks
    assert table.cost(taken) <= table.limit
    assert max(c.errors[i] for c, i in zip(layers, taken, strict=True)) == min(e.max() for e in possible)
    mean = solve(layers, [table], 2.0)
    norm = p_norm(np.array([c.errors[i] for c, i in zip(layers, mean.picks, strict=True)]), 2.0)
    best = min(p_norm(e, 2.0) for e in possible)
    assert best <= norm * (1 + 1e-12) and norm <= best * (1 + mean.gap) * (1 + 1e-9)
    both = solve(layers, [table, params_table(layers, 120, 1.0)], math.inf)
    worst = max(c.errors[i] for c, i in zip(layers, both.picks, strict=True))
    assert table.cost(both.picks) <= table.limit and min(e.max() for e in possible) <= worst
    reach = max(c.errors.min() for c in layers)
    within = solve_error(layers, reach).picks
    assert all(c.errors[i] <= reach for c, i in zip(layers, within, strict=True))


REFUSED = [
    ({"pins": {"zzz": "dense"}}, LayerNotFoundError, "pins='zzz' matches no layer, neither by name nor by class"),
    ({"pins": {"0": "thick"}}, ArgumentError, r"pins\['0'\]='thick' is neither 'dense' nor a dict of min_rank"),
    ({"pins": {"0": {"rank": 3}}}, ArgumentError, r"pins\['0'\]=.*is neither 'dense' nor a dict of min_rank, max_rank"),
    ({"pins": {"0": {}}}, ArgumentError, "is neither 'dense' nor a dict"),
    ({"pins": {"0": {"max_rank": 0}}}, ArgumentError, r"pins\['0'\]: max_rank=0 is not an integer >= 1"),
    ({"pins": {"0": {"min_keep": 1.5}}}, ArgumentError, r"pins\['0'\]: min_keep=1.5 is outside \(0, 1\]"),
    ({"pins": {3: "dense"}}, ArgumentError, "pins=.*expected a name pattern"),
    ({"pins": "dense"}, ArgumentError, "pins is a str: expected a dict by layer, for example"),
    ({"min_rank": 0}, ArgumentError, "min_rank=0 is not an integer >= 1"),
    (
        {"pins": {"0": "dense", "*": {"max_rank": 4}}},
        ArgumentError,
        r"pins contradict each other for layer '0': '0' dense, '\*' max_rank=4",
    ),
    ({"pins": {"0": {"min_rank": 9}, "?": {"max_rank": 4}}}, ArgumentError, "pins contradict each other for layer '0'"),
    ({"pins": {"0": {"min_keep": 0.9}, "?": {"max_keep": 0.4}}}, ArgumentError, "contradict each other for layer '0'"),
    ({"pins": {"0": {"max_rank": 4}}, "min_rank": 9}, ArgumentError, "min_rank=9 contradicts the pins of layer '0'"),
    (
        {"pins": {"3": {"min_rank": 500, "max_keep": 0.9}}},
        ArgumentError,
        "pins leave layer '3' no choice: .*; it could have ranks of 1 to",
    ),
    (
        {"pins": {"0": {"max_rank": 4}}, "method": "svd"},
        ArgumentError,
        r"pins\['0'\] goes with method='alds', not 'svd', which knows 'dense' only",
    ),
    ({"min_rank": 4, "method": "svd"}, ArgumentError, "min_rank= goes with method='alds'"),
]


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED)
def test_pins_that_cannot_be_are_refused(analysis, options, kind, message):
    for call in (analysis.plan, lambda **o: alds.compress(small_net(), **o)):
        with pytest.raises(kind, match=message):
            call(params=0.6, **options)


def test_limits_of_layers_that_are_left_out_are_refused_and_dense_is_not():
    analysis = alds.analyze(small_net(), exclude="0")
    with pytest.raises(ArgumentError, match=r"means no layer that can be decomposed: '0' is left out \(matched by ex"):
        analysis.plan(params=0.6, pins={"0": {"max_rank": 3}})
    assert analysis.plan(params=0.6, pins={"0": "dense"}).layers[0].reason == "matched by exclude="


def test_a_budget_that_pins_make_impossible_names_what_can_be_reached(analysis):
    pins = {"3": "dense", "8": {"max_rank": 4}}
    message = r"the smallest reachable is params=(0\.\d+).*; that is with pins '3' dense, '8' max_rank=4 and min_rank=2"
    with pytest.raises(BudgetError, match=message) as caught:
        analysis.plan(params=0.5, pins=pins, min_rank=2)
    reachable = float(str(caught.value).split("reachable is params=")[1].split(",")[0])
    assert analysis.plan(params=reachable, pins=pins, min_rank=2).params <= reachable * analysis.params
    with pytest.raises(
        BudgetError, match=r"error=0.1 cannot be met.*is error=(0\.\d+), that of layer '5'; that is"
    ) as e:
        analysis.plan(error=0.1, pins={"5": {"max_rank": 4}})
    reachable = float(str(e.value).split("reachable is error=")[1].split(",")[0])
    plan = analysis.plan(error=reachable, pins={"5": {"max_rank": 4}})
    assert plan.layers[2].rank <= 4 and plan.error <= reachable


def test_pins_go_with_float32_spectra_and_with_data():
    model = small_net()
    pins = {"3": {"min_rank": 4, "max_keep": 0.5}, "0": "dense"}
    exact, quick = (alds.analyze(model, precision=t).plan(params=0.6, pins=pins) for t in ("float64", "float32"))
    assert [row.choice for row in exact.layers] == [row.choice for row in quick.layers]
    small = alds.compress(model, params=0.6, data=[images(16)], pins=pins, groups=(1, 2))
    assert isinstance(small[0], nn.Conv2d) and small[3].rank >= 4 and torch.isfinite(small(images())).all()
    assert small.alds_plan.pins == pins


def test_pins_in_files_are_checked(analysis):
    text = analysis.plan(params=0.6, pins={"0": "dense"}).to_json()
    with pytest.raises(PlanError, match=r"plan: pins\['0'\]='thick' is neither"):
        alds.Plan.from_json(text.replace('"0": "dense"', '"0": "thick"'))
    old = text.replace('"pins": {\n  "0": "dense"\n },\n "min_rank": 1,\n', "")
    assert old != text and alds.Plan.from_json(old).pins == {} and alds.Plan.from_json(old).min_rank == 1


def test_an_analysis_tells_how_compressible_layers_are():
    torch.manual_seed(0)
    low, full = nn.Linear(40, 30, bias=False), nn.Linear(30, 30, bias=False)
    with torch.no_grad():
        low.weight.copy_(torch.randn(30, 4) @ torch.randn(4, 40))
    text = str(alds.analyze(nn.Sequential(low, full), groups=(1,)))
    first, second = text.splitlines()[2:4]
    assert (
        first.count("scheme 0, groups 1     4 ") == first.count("23.3%") == 2
        and "dense               full  100.0%" in second
    )
    assert "2 layers that can be factorised; of these, " in text and "within 1% and" in text
