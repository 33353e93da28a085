"""Many budgets from one analysis, the knee of their curve, and two plans side by side."""

import importlib.util
import json
import math

import pytest
import torch
from support.models import images, small_net
from torch import nn

import alds_fast as alds
from alds_fast.errors import ArgumentError, BudgetError, PlanError
from alds_fast.planning import plot_sweep


@pytest.fixture(scope="module")
def analysis():
    return alds.analyze(small_net())


def test_a_sweep_has_the_plan_of_every_budget(analysis):
    sweep = analysis.sweep((0.3, 0.9, 0.6), p=2, example_inputs=images())
    assert [plan.budget for plan in sweep.plans] == ["params=0.9", "params=0.6", "params=0.3"]
    assert sweep.plans[1] == analysis.plan(params=0.6, p=2, example_inputs=images())
    assert [sweep.kept(plan) for plan in sweep.plans] == [plan.keep_ratio for plan in sweep.plans]
    lines = str(sweep).splitlines()
    assert lines[0].split() == ["asked", "parameters", "kept", "FLOPs", "kept", "MB", "largest", "error"]
    assert (
        lines[3].startswith("params=0.6  ")
        and f"{sweep.plans[1].flops / sweep.plans[1].costs['flops'][0]:.2%}" in lines[3]
    )
    assert sum("knee" in line for line in lines) == (sweep.knee is not None)


def test_budgets_that_cannot_be_met_are_named(analysis):
    assert len(analysis.sweep().plans) == 9
    sweep = analysis.sweep((0.5, 0.02))
    assert len(sweep.plans) == 1 and "params=0.02 cannot be met" in sweep.left_out[0.02]
    assert str(sweep).endswith(f"left out: {sweep.left_out[0.02]}")
    with pytest.raises(BudgetError, match="params=0.01 cannot be met"):
        analysis.sweep([0.01])


@pytest.mark.parametrize("budget", ["flops", "memory"])
def test_sweeps_of_other_budgets(analysis, budget):
    inputs = images() if budget == "flops" else None  # with inputs activations count to memory, which are most of it
    sweep = analysis.sweep((0.8, 0.5), budget=budget, example_inputs=inputs)
    for plan, share in zip(sweep.plans, (0.8, 0.5), strict=True):
        assert share - 0.05 < sweep.kept(plan) <= share


def test_the_knee_of_a_network_that_half_can_be_left_out_of():
    """Weights of rank 4 in 32 and noise: below some share errors jump from the noise's to the signal's."""
    torch.manual_seed(0)
    layers = [nn.Linear(32, 32, bias=False) for _ in range(3)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.randn(32, 4) @ torch.randn(4, 32) + 0.05 * torch.randn(32, 32))
    sweep = alds.analyze(nn.Sequential(*layers), groups=(1,)).sweep([i / 20 for i in range(2, 21)])
    errors = [plan.error for plan in sweep.plans]
    assert sweep.knee.error < 0.05 and 0.2 <= sweep.knee.keep_ratio <= 0.35
    assert errors == sorted(errors) and errors[-1] > 0.3
    assert str(sweep).count("knee") == 1
    flat = alds.analyze(nn.Sequential(*layers), groups=(1,)).sweep([1.0])
    assert flat.knee is None and "knee" not in str(flat)


def test_shares_numbers_and_texts_may_be_mixed():
    analysis = alds.analyze(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), groups=(1,))
    by_params = analysis.sweep((0.9, 6000, 0.4, 0.001))
    assert [plan.budget for plan in by_params.plans] == ["params=0.9", "params=6000", "params=0.4"]
    assert list(by_params.left_out) == [0.001]
    for none in (None, 1.5, 0, "30kB"):
        with pytest.raises(alds.AldsError, match="params=|give one budget"):
            analysis.sweep((0.9, none))
    with pytest.raises(alds.AldsError, match="memory='30 apples' is not like"):
        analysis.sweep((0.9, "30 apples"), budget="memory")
    by_memory = analysis.sweep(("30kB", "9kB", 0.5), budget="memory")
    sizes = [plan.memory for plan in by_memory.plans]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 3


def test_a_curve_that_bends_the_other_way_has_no_knee():
    sweep = alds.analyze(small_net()).sweep([1.0, 0.5])
    assert sweep.plans[0].error < sweep.plans[1].error and sweep.knee is None


def test_what_sweeps_refuse(analysis):
    with pytest.raises(ArgumentError, match="budget='latency' is not one of params, flops, memory"):
        analysis.sweep(budget="latency")
    with pytest.raises(BudgetError, match=r"budgets=0\.5: expected a list of budgets"):
        analysis.sweep(0.5)
    with pytest.raises(ArgumentError, match="flops= needs example_inputs="):
        analysis.sweep(budget="flops")


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="without matplotlib")
def test_a_sweep_is_drawn(analysis, tmp_path):
    for budget in ("params", "flops"):
        plot_sweep(analysis.sweep(budget=budget, example_inputs=images()), tmp_path / "curve.svg")
        assert f"{'FLOPs' if budget == 'flops' else 'parameters'} kept" in (tmp_path / "curve.svg").read_text()
    with pytest.raises(ArgumentError, match="does not end in"):
        plot_sweep(analysis.sweep([0.5]), tmp_path / "curve.txt")


def test_two_plans_side_by_side(analysis):
    half, pinned = analysis.plan(params=0.7), analysis.plan(params=0.7, pins={"0": "dense", "5": {"max_rank": 9}})
    text = half.diff(pinned)
    differ = [row.name for row, other in zip(half.layers, pinned.layers, strict=True) if row != other]
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2:-3]] == differ
    assert lines[-3] == f"{len(differ)} layers differ, {4 - len(differ)} do not"
    assert lines[-2] == f"first: {repr(half)[10:].split(';')[0]}" and lines[-1].startswith("then:  params=0.7: ")
    first = next(line for line in lines if line.startswith("0 "))
    assert "dense" in first and f"{pinned.layers[0].params_after - half.layers[0].params_after:+,}" in first
    assert half.diff(half).startswith("0 layers differ, 4 do not")
    data = json.loads(half.to_json())
    data["layers"][1]["rank"] = 1
    edited = alds.Plan.from_json(json.dumps(data))
    assert math.isnan(edited.error) and "?" in half.diff(edited)
    with pytest.raises(PlanError, match="diff: the other plan has other layers"):
        half.diff(alds.analyze(nn.Linear(8, 8)).plan(params=1.0))
