import dataclasses
import html
import json
import math

import pytest
import torch
from support.models import count, images, small_net
from torch import nn

import alds_fast as alds
from alds_fast.errors import LayerNotFoundError, PlanError
from alds_fast.planning.plan_texts import row_cells


@pytest.fixture(scope="module")
def plan():
    return alds.analyze(small_net()).plan(params=0.5)


def test_plan_is_frozen(plan):
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.params_before = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.layers[0].rank = 3


def test_plan_prints_as_a_table(plan):
    lines = str(plan).splitlines()
    assert " ".join(lines[0].split()) == "layer kind shape scheme groups rank error params after reason"
    assert len(lines) == 2 + len(plan.layers) + 2
    assert f"-> {plan.params:,}" in lines[-2] and "largest frobenius error" in lines[-2]
    assert lines[-1].startswith("weights ")


def test_plan_totals(plan):
    assert plan.error == max(row.error for row in plan.layers)
    assert plan.params_before == count(small_net()) and plan.keep_ratio == plan.params / plan.params_before
    assert (plan.criterion, plan.method, plan.p, plan.gap) == ("frobenius", "alds", 4.0, pytest.approx(0.0, abs=0.05))


@pytest.mark.parametrize("options", [{}, {"p": 3}, {"criterion": "paper"}, {"method": "alds-heuristic"}, {"align": 2}])
def test_json_round_trip_is_exact(options):
    model = small_net()
    plan = alds.analyze(model).plan(params=0.45, **options)
    reread = alds.Plan.from_json(plan.to_json())
    assert reread == plan and reread.to_json() == plan.to_json()
    assert torch.equal(reread.apply(model)(images()), plan.apply(model)(images()))


def _edit(plan, **fields):
    data = json.loads(plan.to_json())
    data["layers"][1].update(fields)
    return json.dumps(data)


def test_a_plan_can_be_edited_by_hand(plan):
    model = small_net()
    edited = alds.Plan.from_json(_edit(plan, scheme=1, groups=2, rank=5))
    small = edited.apply(model)
    assert (small[3].scheme, small[3].groups, small[3].rank) == (1, 2, 5)
    assert edited.params == count(small)
    assert math.isnan(edited.layers[1].error) and math.isnan(edited.error) and math.isnan(edited.gap)
    assert "?" in str(edited)
    assert alds.Plan.from_json(edited.to_json()).to_json() == edited.to_json()
    other = alds.Plan.from_json(_edit(plan, scheme=2, groups=2, rank=5))  # of the same size as scheme 1
    assert other.params == edited.params and math.isnan(other.layers[1].error)
    dense = alds.Plan.from_json(_edit(plan, scheme=None, groups=None, rank=None))
    assert type(dense.apply(model)[3]) is nn.Conv2d and dense.layers[1].reason == "kept dense by hand"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, r"layer '3': rank=0 is outside 1\.\."),
        ({"rank": 10_000}, "layer '3': rank=10000 is outside"),
        ({"rank": 1.5}, "layer '3': scheme, groups and rank must be integers"),
        ({"groups": 5}, "layer '3': groups=5 does not divide its 12 channels"),
        ({"scheme": 9}, "scheme 9 is not one of"),
        ({"rank": None}, "layer '3': scheme, groups and rank must be all null or all integers"),
        ({"surprise": 1}, "surprise"),
        ({"shape": []}, r"layer '3': shape=\(\) with conv_groups=2 is not that of a layer"),
        ({"shape": "x"}, "layer '3': shape='x' is not a list"),
        ({"conv_groups": 0}, "conv_groups=0 is not that of a layer"),
        ({"conv_groups": True}, "layer '3': conv_groups=True is not an integer"),
        ({"params_before": -5}, "layer '3': params_before=-5 is not an integer >= 0"),
        ({"params_before": None}, "layer '3': params_before=None is not"),
        ({"name": 5}, "name=5 is not a text"),
        ({"error": "low"}, "layer '3': error='low' is not a number"),
    ],
)
def test_impossible_rows_are_refused(plan, fields, message):
    with pytest.raises(alds.AldsError, match=message):
        alds.Plan.from_json(_edit(plan, **fields))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a plan"),
        ("{", "not a plan"),
        ("[]", "not a plan"),
        ("{}", "the field 'format' is missing"),
        ('{"format": "other"}', "its format is 'other'"),
        ('{"format": "alds_fast.plan", "version": 99}', "version 99 is newer than 1; update alds_fast"),
        ('{"format": "alds_fast.plan", "version": 1}', "the field 'layers' is missing"),
        ('{"format": "alds_fast.plan", "version": 1, "layers": [{}]}', "not a plan"),
        ("[" * 100_000, "not a plan"),
        ('{"format": "alds_fast.plan", "version": 1, "layers": 3}', "not a plan"),
    ],
)
def test_text_that_is_not_a_plan_is_refused(text, message):
    with pytest.raises(PlanError, match=message):
        alds.Plan.from_json(text)


def test_a_plan_of_another_model_is_refused(plan):
    other = small_net()
    other[5] = nn.Linear(32, 32)
    with pytest.raises(PlanError, match=r"layer '5'.*the plan was made for"):
        plan.apply(other)
    with pytest.raises(PlanError, match="the plan is for 5,594 parameters, the model has 12"):
        plan.apply(nn.Linear(3, 3))
    renamed = nn.Sequential(nn.Identity(), *small_net())
    with pytest.raises(LayerNotFoundError, match="the plan's layer '0' is not in the model"):
        plan.apply(renamed)


def test_a_plan_fits_a_model_with_other_weights():
    """The analysis' spectra are the certificate only of the weights that were analysed."""
    plan = alds.analyze(small_net(0)).plan(params=0.5)
    other = small_net(1)
    small, direct = plan.apply(other), alds.Plan.from_json(plan.to_json()).apply(other)
    assert torch.equal(small(images()), direct(images()))
    assert all(0 < r.error < 1 for r in small.alds_factors.values())


def test_two_plans_of_one_analysis_do_not_disturb_each_other():
    model = small_net()
    analysis = alds.analyze(model)
    first = analysis.plan(params=0.5)
    text = str(first)
    analysis.plan(params=0.2).apply(model)
    assert str(first) == text


@pytest.mark.parametrize("budget", ["", "params", "error=0.1, params=0.5", "size=3"])
def test_a_budget_that_no_plan_has_is_refused(plan, budget):
    text = plan.to_json().replace("params=0.5", budget)
    with pytest.raises(PlanError, match="is not like 'params=0.5, flops=0.3'"):
        alds.Plan.from_json(text)


def test_plans_and_analyses_are_short_in_words_and_small_errors_have_digits():
    analysis = alds.analyze(nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)))
    plan = analysis.plan(params=0.6)
    assert repr(analysis) == "<Analysis of 2 layers, 2 can be factorised; print() lists them>"
    assert repr(plan).startswith("<Plan for params=0.6: 1,200 -> ") and len(repr(plan)) < 120
    assert f"{plan.error:.4g}; print() has layers>" in repr(plan)
    swept = repr(analysis.sweep([0.6, 0.5, 0.001]))
    assert swept == "<Sweep of 2 plans by params, 1 cannot be met; print() lists them>"
    texts = [
        row_cells(dataclasses.replace(plan.layers[0], error=error), False)[6] for error in (0.0, 0.25, 2e-3, 1.23e-4)
    ]
    assert texts == ["0", "0.2500", "0.0020", "1.2e-04"]


def test_notebooks_show_the_tables(plan):
    marked = dataclasses.replace(plan.layers[0], remark="a<b & c")
    odd = dataclasses.replace(plan, layers=(marked, *plan.layers[1:]))
    start, _, table = odd._repr_html_().partition(">")
    assert start.startswith("<pre") and "a<b" in str(odd) and "a<b" not in table
    assert html.unescape(table.removesuffix("</pre>")) == str(odd)
    analysis = alds.analyze(nn.Linear(32, 32))
    sweep = analysis.sweep([0.5])
    for thing in (analysis, sweep):
        assert html.unescape(thing._repr_html_()).endswith(f">{thing}</pre>")
