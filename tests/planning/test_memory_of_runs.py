"""Budgets on memory with example inputs: weights and the measured peak of activations, together within the budget."""

import json
import logging

import pytest
import torch
from support.storages import followed_peak
from torch import nn

import alds_fast as alds
from alds_fast.errors import BudgetError
from alds_fast.layers import count_bytes
from alds_fast.measurement import peak_of_activations


def conv_net():
    """One whose activations are nine tenths of its memory, at their peak in the second layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4),
        nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 64, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 32)).eval()


NETS = {"conv": (conv_net(), torch.randn(2, 3, 64, 64)), "mlp": (mlp(), torch.randn(16, 64))}
ANALYSES = {name: alds.analyze(net) for name, (net, _) in NETS.items()}


def sizes(model, x):
    return count_bytes(model), peak_of_activations(model, x).whole


@pytest.mark.parametrize(("name", "share"), [("conv", 0.97), ("conv", 0.92), ("mlp", 0.8), ("mlp", 0.4)])
def test_weights_and_peak_are_within_the_budget(name, share):
    net, x = NETS[name]
    plan = ANALYSES[name].plan(memory=share, example_inputs=x)
    small = plan.apply(net).eval()
    weights, peak = sizes(small, x)
    assert plan.costs["memory"] == (count_bytes(net), weights) and plan.costs["activations"] == (sizes(net, x)[1], peak)
    assert 0.99 * share * sum(sizes(net, x)) < plan.memory == weights + peak <= share * sum(sizes(net, x))
    assert alds.Plan.from_json(plan.to_json()) == plan


def test_an_independent_count_of_what_a_plan_takes():
    net, x = NETS["mlp"]
    plan = ANALYSES["mlp"].plan(memory=0.5, example_inputs=x)
    assert plan.costs["activations"] == (followed_peak(net, x), followed_peak(plan.apply(net).eval(), x))
    assert plan.costs["activations"][1] > plan.costs["activations"][0]  # what is between factors


def test_where_activations_dominate_the_peak_does_not_grow():
    net, x = NETS["conv"]
    plan = ANALYSES["conv"].plan(memory=0.94, example_inputs=x)
    before, after = plan.costs["activations"]
    assert before > 0.8 * sum(sizes(net, x)) and after == before
    rows = {row.name: row for row in plan.layers}
    assert rows["2"].choice is None and rows["2"].reason == "no factorisation saves memory"
    low = ANALYSES["conv"].plan(params=plan.params).apply(net).eval()
    assert sum(sizes(low, x)) > plan.memory  # of the same size, but with a higher peak


def test_where_weights_dominate_it_is_the_plan_of_what_the_peak_leaves():
    plan = ANALYSES["mlp"].plan(memory=0.5, example_inputs=NETS["mlp"][1])
    weights = plan.costs["memory"][1]
    alone = ANALYSES["mlp"].plan(memory=weights)
    assert [row.choice for row in plan.layers] == [row.choice for row in alone.layers]
    assert "activations" not in alone.costs and alone.memory == weights


def test_what_a_printed_plan_says():
    total = sum(sizes(*NETS["mlp"]))
    plan = ANALYSES["mlp"].plan(memory=total // 2, example_inputs=NETS["mlp"][1])
    weights, peak = (plan.costs[name][1] / 1e6 for name in ("memory", "activations"))
    said = f"memory {total // 2 / 1e6:.4g} MB asked, {plan.memory / 1e6:.4g} MB reached: weights of {weights:.4g} MB + "
    assert str(plan).endswith(f"{said}activations of {peak:.4g} MB, the peak of a run as measured")
    alone = str(ANALYSES["mlp"].plan(memory="100 kB")).splitlines()[-1]
    assert alone.startswith("memory 0.1 MB asked, 0.0") and alone.endswith("weights alone, as no run was measured")
    assert "asked, " not in str(ANALYSES["mlp"].plan(params=0.5, example_inputs=NETS["mlp"][1])).splitlines()[-1]


@pytest.mark.parametrize("name", NETS)
def test_what_cannot_be_met_names_what_can(name):
    x = NETS[name][1]
    with pytest.raises(
        BudgetError, match=r"memory=2000, 0.002 MB, cannot be met: the smallest found is memory=\d+"
    ) as e:
        ANALYSES[name].plan(memory="2kB", example_inputs=x)
    assert "activations alone are more than asked: give inputs of fewer samples" in str(e.value)
    least = int(str(e.value).split("smallest found is memory=")[1].split(",")[0])
    with pytest.warns(UserWarning, match="errors above 0.9"):
        assert ANALYSES[name].plan(memory=least, example_inputs=x).memory == least
    with pytest.raises(BudgetError, match=rf"memory={least - 1}, .* MB \+ activations of [^;]*$"):
        ANALYSES[name].plan(memory=least - 1, example_inputs=x)


def test_other_budgets_hold_too():
    net, x = NETS["mlp"]
    plan = ANALYSES["mlp"].plan(memory=0.7, flops=0.4, params=0.9, example_inputs=x)
    assert plan.flops <= 0.4 * plan.costs["flops"][0] and plan.memory <= 0.7 * sum(sizes(net, x))
    with pytest.raises(BudgetError, match=r"flops=0.4 and memory=0.7 and|flops=0.0001 cannot be met"):
        ANALYSES["mlp"].plan(memory=0.7, flops=0.0001, example_inputs=x)


def test_a_baseline_and_pins(caplog):
    net, x = NETS["mlp"]
    total = sum(sizes(net, x))
    assert ANALYSES["mlp"].plan(memory=0.6, example_inputs=x, method="svd").memory <= 0.6 * total
    with caplog.at_level(logging.INFO, "alds_fast"):
        plan = ANALYSES["mlp"].plan(memory=0.9, example_inputs=x, pins={"2": "dense"})
    assert plan.memory <= 0.9 * total and plan.layers[1].choice is None
    assert (
        f"{plan.costs['memory'][1]} bytes of weights and {plan.costs['activations'][1]} of activations" in caplog.text
    )


def test_fewer_hidden_units_make_the_peak_smaller():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 5)).eval()
    data = list(torch.randn(4, 60, 16) @ torch.diag(torch.logspace(0, -1, 16)))
    analysis = alds.analyze(net, data=data, sensitivity=True, groups=(1,))
    plan = analysis.plan(memory=0.7, example_inputs=data[0], hidden_units=True)
    small = plan.apply(net).eval()
    assert plan.hidden_units and plan.budget == "memory=0.7"
    assert (plan.costs["memory"][1], plan.costs["activations"][1]) == sizes(small, data[0])
    before, after = plan.costs["activations"]
    assert after < before == sizes(net, data[0])[1] and plan.memory <= 0.7 * sum(sizes(net, data[0]))


def test_in_one_call_in_a_sweep_and_in_files():
    net, x = NETS["mlp"]
    small = alds.compress(net, memory="200 kB", example_inputs=x)
    assert sum(sizes(small, x)) == small.alds_plan.memory <= 200_000
    swept = ANALYSES["mlp"].sweep((0.8, 0.4), budget="memory", example_inputs=x)
    assert all(0.99 * share < swept.kept(plan) <= share for plan, share in zip(swept.plans, (0.8, 0.4), strict=True))
    data = json.loads(swept.plans[0].to_json())
    assert data["costs"]["activations"] == list(swept.plans[0].costs["activations"])


def test_a_plan_that_does_not_fit_ends_no_search():
    """Peaks of plans go up and down: many of more weights fit than the first that does."""
    torch.manual_seed(0)
    convs = [part for c in (3, 64, 64) for part in (nn.Conv2d(c, 64, 3, padding=1), nn.ReLU())]
    heads = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10)
    model, x = nn.Sequential(*convs, *heads).eval(), torch.randn(1, 3, 16, 16)
    analysis = alds.analyze(model)
    plan, other = analysis.plan(memory=0.6, example_inputs=x), analysis.plan(params=0.55)
    limit = 0.6 * sum(plan.costs[part][0] for part in ("memory", "activations"))
    assert sum(sizes(other.apply(model), x)) <= limit
    assert plan.memory <= limit and plan.error <= other.error
