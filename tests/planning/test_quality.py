"""The smallest plan of enough quality, found by bisection over one analysis."""

import json
import logging
import math

import pytest
import torch
from support.models import count, images, small_net
from torch import nn

import alds_fast as alds
from alds_fast.errors import ArgumentError, BudgetError, PlanError

X = images(16)


def closeness(reference):
    """1 less the relative distance of the outputs from those of a model, and how often it was asked."""
    with torch.no_grad():
        wanted = reference(X)

    def evaluate(model):
        assert not model.training
        evaluate.calls += 1
        return 1 - (model(X) - wanted).norm() / wanted.norm()

    evaluate.calls = 0
    return evaluate


@pytest.fixture(scope="module")
def analysis():
    return alds.analyze(small_net())


@pytest.mark.parametrize("quality", [0.95, 0.85])
def test_the_plan_is_good_enough_and_a_little_less_is_not(analysis, quality, caplog):
    model, evaluate = small_net(), closeness(small_net())
    with caplog.at_level(logging.INFO, logger="alds_fast"):
        plan = analysis.plan(quality=quality, evaluate=evaluate, p=2)
    found = plan.quality
    assert found.measured == float(evaluate(plan.apply(model))) >= quality and found.asked == quality
    assert found.dense == 1.0 and evaluate.calls == len(found.steps) + 1 <= 10
    less = analysis.plan(params=plan.keep_ratio - 1 / 200, p=2)
    assert less.params < plan.params and float(evaluate(less.apply(model))) < quality
    assert plan.keep_ratio == min(keep for keep, measured in found.steps if measured >= quality)
    assert plan.budget == f"quality={quality}" and plan.budgets == {"quality": quality} and plan.p == 2
    assert str(found) in str(plan) and f"{found.steps[1][1]:.6g} at {found.steps[1][0]:.2%}" in str(found)
    assert sum("of the parameters" in record.message for record in caplog.records) == len(found.steps) - 1
    assert alds.Plan.from_json(plan.to_json()) == plan


def test_compress_measures_what_it_gives_back():
    model, evaluate = small_net(), closeness(small_net())
    options = {"quality": 0.98, "evaluate": evaluate, "groups": (1, 2)}
    plain = alds.compress(model, data=[X], **options)
    fitted = alds.compress(model, data=[X], refit=True, **options)
    for small in (plain, fitted):
        assert float(evaluate(small)) == small.alds_plan.quality.measured >= 0.98
        assert count(small) == small.alds_plan.params and small.alds_plan.basis is None
    assert count(fitted) < count(plain)


def test_where_nothing_but_the_dense_model_is_good_enough(analysis):
    plan = analysis.plan(quality=1.0, evaluate=closeness(small_net()))
    assert plan.keep_ratio == 1.0 and plan.error == 0.0 and plan.quality.measured == 1.0
    small = alds.compress(small_net(), quality=1.0, evaluate=closeness(small_net()))
    assert small.alds_plan.quality.measured == 1.0 and count(small) == count(small_net())


def test_where_everything_is_good_enough_the_smallest_there_is_comes_out(analysis):
    plan = analysis.plan(quality=-5, evaluate=lambda model: 0.0)
    with pytest.raises(BudgetError, match="the smallest reachable is params=") as caught:
        analysis.plan(params=0.001)
    least = float(str(caught.value).split("reachable is params=")[1].split(",")[0])
    assert least <= plan.keep_ratio + 1e-4 <= least + 0.01


def test_pins_hold_in_the_search(analysis):
    plan = analysis.plan(quality=0.5, evaluate=closeness(small_net()), pins={"3": "dense"})
    assert plan.layers[1].rank is None and plan.pins == {"3": "dense"} and plan.quality.measured >= 0.5


def test_the_model_is_left_as_it_was(analysis):
    model = small_net().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    alds.analyze(model).plan(quality=0.8, evaluate=closeness(small_net()))
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())


REFUSED = [
    ({"quality": 0.9}, ArgumentError, "quality= needs evaluate=, a function of a model"),
    ({"evaluate": lambda m: 1.0}, BudgetError, "evaluate= goes with quality="),
    ({"quality": "good", "evaluate": lambda m: 1.0}, BudgetError, "quality='good' is not a number"),
    ({"quality": math.nan, "evaluate": lambda m: 1.0}, BudgetError, "quality=nan is not a number"),
    (
        {"quality": 0.9, "evaluate": lambda m: 1.0, "params": 0.5},
        BudgetError,
        "quality= stands alone.*leave params=",
    ),
    (
        {"quality": 0.9, "evaluate": lambda m: 0.7},
        BudgetError,
        "quality=0.9 cannot be met: evaluate returns 0.7",
    ),
    ({"quality": 0.9, "evaluate": lambda m: "1"}, ArgumentError, "evaluate returned '1': expected a finite number"),
    ({"quality": 0.9, "evaluate": lambda m: math.nan}, ArgumentError, "evaluate returned nan"),
]


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED)
def test_what_a_search_refuses(analysis, options, kind, message):
    for call in (analysis.plan, lambda **o: alds.compress(small_net(), **o)):
        with pytest.raises(kind, match=message):
            call(**options)


def test_what_is_measured_is_checked_in_files_and_forgotten_where_a_plan_is_edited():
    analysis = alds.analyze(nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)))
    data = json.loads(analysis.plan(quality=0.0, evaluate=lambda model: 1.0).to_json())
    edited = json.loads(json.dumps(data))
    edited["layers"][0] |= {"scheme": None, "groups": None, "rank": None, "pivots": ""}
    assert alds.Plan.from_json(json.dumps(edited)).quality is None
    data["quality"]["steps"] = [1]
    with pytest.raises(PlanError, match="does not have the fields of a measured quality"):
        alds.Plan.from_json(json.dumps(data))


def test_what_goes_with_what_is_said():
    model = nn.Sequential(nn.Linear(32, 32))
    plan = alds.analyze(model).plan(params=0.5)
    with pytest.raises(PlanError, match="expected a plan, got a int"):
        plan.diff(3)
    for sensitivity in (True, "kl"):
        with pytest.raises(ArgumentError, match="sensitivity= needs data="):
            alds.compress(model, params=0.5, sensitivity=sensitivity)
