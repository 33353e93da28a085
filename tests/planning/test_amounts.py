"""Budgets as numbers of parameters, operations and bytes, and what a plan says of them."""

import json

import pytest
import torch
from support.models import count, images, small_net
from torch import nn

import alds_fast as alds
from alds_fast.errors import BudgetError, PlanError
from alds_fast.measurement import peak_of_activations
from alds_fast.planning import budget_amount


@pytest.fixture(scope="module")
def analysis():
    return alds.analyze(small_net())


def bytes_of(model):
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def test_a_number_of_parameters_is_like_the_share_that_it_is(analysis):
    total = analysis.params
    plan = analysis.plan(params=total // 2)
    assert (
        plan.params <= total // 2 and plan.budget == f"params={total // 2}" and plan.budgets == {"params": total // 2}
    )
    assert [row.choice for row in plan.layers] == [row.choice for row in analysis.plan(params=0.5).layers]
    assert alds.Plan.from_json(plan.to_json()) == plan
    assert analysis.plan(params=2 * total).error == 0.0


def test_a_number_of_operations(analysis):
    whole = analysis.plan(params=1.0, example_inputs=images()).costs["flops"][0]
    plan = analysis.plan(flops=whole // 2, example_inputs=images())
    assert plan.flops <= whole // 2 and plan.costs["flops"][0] == whole
    assert [row.choice for row in plan.layers] == [
        row.choice for row in analysis.plan(flops=(whole // 2) / whole, example_inputs=images()).layers
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("memory", [0.6, 12_000])
def test_memory_is_the_bytes_of_parameters_and_buffers(dtype, memory):
    model = small_net()
    for i in (3, 8):
        model[i].to(dtype)
    plan = alds.analyze(model).plan(memory=memory)
    small = plan.apply(model)
    assert plan.memory == bytes_of(small) and plan.costs["memory"][0] == bytes_of(model) and plan.flops is None
    allowed = memory if memory > 1 else memory * bytes_of(model)
    assert 0.9 * allowed < plan.memory <= allowed
    assert any(row.pivots for row in plan.layers)  # whose indices have more bytes than the weights' numbers


def test_memory_as_a_text_and_with_other_budgets(analysis):
    assert [budget_amount(t) for t in ("20MB", "1.5 GiB", "512KiB", "3 kb", "7B", "1TB")] == [
        20_000_000, 1_610_612_736, 524_288, 3000, 7, 10**12,
    ]  # fmt: skip
    plan = analysis.plan(memory="13 kB")
    assert plan.memory <= 13_000 and plan.budget == "memory=13000"
    memory = 13_000 + peak_of_activations(small_net(), images()).whole
    small = alds.compress(small_net(), memory=memory, params=3000, flops=0.6, example_inputs=images())
    made = small.alds_plan
    assert bytes_of(small) + made.costs["activations"][1] == made.memory <= memory and count(small) <= 3000
    assert made.flops <= 0.6 * made.costs["flops"][0] and made.budget == f"params=3000, flops=0.6, memory={memory}"
    assert alds.Plan.from_json(made.to_json()).costs == made.costs


def test_numbers_that_cannot_be_met_name_the_smallest_that_can(analysis):
    with pytest.raises(BudgetError, match=r"params=100 cannot be met: the smallest reachable is params=(\d+), ") as e:
        analysis.plan(params=100)
    least = int(str(e.value).split("reachable is params=")[1].split(",")[0])
    assert analysis.plan(params=least).params == least
    with pytest.raises(BudgetError):
        analysis.plan(params=least - 1)
    with pytest.raises(BudgetError, match=r"memory=2000 cannot be met: the smallest reachable is memory=\d+.* MB"):
        analysis.plan(memory="2kB")


def test_the_precision_of_spectra_does_not_matter_under_memory():
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(4)))
    exact, quick = (alds.analyze(model, precision=t).plan(memory=0.5) for t in ("float64", "float32"))
    assert [row.choice for row in exact.layers] == [row.choice for row in quick.layers]


def test_a_plan_says_what_it_costs(analysis):
    plan = analysis.plan(params=0.5, example_inputs=images())
    small = plan.apply(small_net())
    again = alds.analyze(small_net()).plan(flops=1.0, example_inputs=images())
    assert plan.costs["flops"][0] == again.flops and plan.memory == bytes_of(small)
    before, after = plan.costs["flops"]
    text = f"FLOPs {before:,} -> {after:,} ({after / before:.2%} kept); weights "
    assert text in str(plan) and text not in str(analysis.plan(params=0.5))


def test_costs_in_files_are_checked_and_forgotten_where_a_plan_is_edited(analysis):
    data = json.loads(analysis.plan(params=0.5).to_json())
    data["costs"] = {"memory": [3]}
    with pytest.raises(PlanError, match="two integers >= 0 each of flops, memory and activations"):
        alds.Plan.from_json(json.dumps(data))
    data["costs"] = {"memory": [3, 2]}
    assert alds.Plan.from_json(json.dumps(data)).memory == 2
    data["layers"][1]["rank"] = 1
    edited = alds.Plan.from_json(json.dumps(data))
    assert edited.memory is None and edited.costs == {} and "weights" not in str(edited)
    del data["costs"]
    assert alds.Plan.from_json(json.dumps(data)).costs == {}
