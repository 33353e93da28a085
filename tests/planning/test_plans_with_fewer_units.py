"""Plans that remove hidden units too: better ones, exact about what they are, in files, again, and refused."""

import json
import math

import pytest
import torch
from support.models import count
from support.population import analyze_population
from torch import nn

import alds_fast as alds
from alds_fast.errors import ArgumentError, BudgetError, PlanError
from alds_fast.layers import dense_shape, narrowed_sizes


class Gated(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.gate, self.up = nn.Linear(16, width, bias=bias), nn.Linear(16, width, bias=bias)
        self.down = nn.Linear(width, 16, bias=bias)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, width), nn.Linear(width, 16)

    def forward(self, x):
        return x + self.fc2(torch.relu(self.fc1(x)))


def build():
    torch.manual_seed(0)
    blocks = nn.ModuleList([Gated(48, False), Mlp(64), Gated(48, True)])
    return nn.Sequential(*blocks, nn.Linear(16, 5)).eval()


@pytest.fixture(scope="module")
def net():
    return build()


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(1)
    return list(torch.randn(8, 12, 10, 16) @ torch.diag(torch.logspace(0, -1, 16)))


@pytest.fixture(scope="module")
def analysis(net, data):
    return alds.analyze(net, data=data, sensitivity=True, groups=(1,))


@pytest.fixture(scope="module")
def plan(analysis):
    return analysis.plan(params=0.5, hidden_units=True)


def squares(plan):
    return sum(row.error**2 for row in plan.layers) + sum(units.error**2 for units in plan.hidden_units)


def apart(small, net, x):
    with torch.no_grad():
        return float((small(x) - net(x)).norm() / net(x).norm())


def test_better_than_ranks_alone(net, analysis, plan, data):
    alone = analysis.plan(params=0.5)
    assert squares(plan) < 0.8 * squares(alone)
    torch.manual_seed(2)
    x = torch.randn(40, 10, 16) @ torch.diag(torch.logspace(0, -1, 16))
    assert apart(plan.apply(net), net, x) < apart(alone.apply(net), net, x)


def test_says_what_it_is(net, plan):
    small = plan.apply(net)
    assert count(small) == plan.params <= 0.5 * count(net)
    assert plan.params_before == count(net) and plan.budget == "params=0.5"
    assert plan.error >= max(units.error for units in plan.hidden_units) > 0
    assert plan.hidden_units
    for units in plan.hidden_units:
        assert units.text in str(plan)
        for name in units.layers:
            module, dense = small.get_submodule(name), net.get_submodule(name)
            assert dense_shape(module) == (dense.out_features, dense.in_features)
            assert (module.in_features if name == units.consumer else module.out_features) == len(units.kept)
    rows = {row.name: row for row in plan.layers}
    assert all(
        rows[name].params_before == sum(p.numel() for p in net.get_submodule(name).parameters()) for name in rows
    )


def test_removal_alone_loses_what_the_plan_says(net, data):
    """With units removed and all ranks full: the consumer's error on the data of calibration."""
    analysis = analyze_population(net, data=data, sensitivity=True, groups=(1,))
    plan = analysis.plan(params=0.8, hidden_units=True)
    whole = alds.Plan.from_json(_without_ranks(plan))
    small = whole.apply(net, moments=analysis.moments)
    (units,) = [u for u in plan.hidden_units if u.consumer == "1.fc2"] or plan.hidden_units[:1]
    seen = {}
    for name, model in (("dense", net), ("small", small)):
        hook = model.get_submodule(units.consumer).register_forward_hook(
            lambda m, a, y, name=name: seen.setdefault(name, []).append(y)
        )
        block = model[int(units.consumer[0])]
        inputs = [net[: int(units.consumer[0])](x) for x in data]  # the block's inputs are the dense model's
        with torch.no_grad():
            for x in inputs:
                block(x)
        hook.remove()
    lost = torch.cat(seen["small"]) - torch.cat(seen["dense"])
    m = analysis.moments[units.consumer]
    rows = lost.detach().double().flatten(0, -2)
    measured = float(torch.einsum("rf,fg,rg->r", rows, m.gradient[0], rows).mean())
    assert math.sqrt(measured) == pytest.approx(units.error, rel=0.01)


def _without_ranks(plan):
    """The plan as JSON, all layers dense."""
    fields = json.loads(plan.to_json())
    for row in fields["layers"]:
        row |= {"scheme": None, "groups": None, "rank": None, "pivots": ""}
    return json.dumps(fields)


def test_json_keeps_it(net, analysis, plan):
    again = alds.Plan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json() and again.hidden_units == plan.hidden_units
    x = torch.randn(3, 10, 16)
    assert torch.equal(again.apply(net, moments=analysis.moments)(x), plan.apply(net)(x))
    with pytest.raises(PlanError, match=r"analysis\.moments"):
        again.apply(net)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("kept", "3-1", "ascend"),
        ("kept", "0-99", "of 48 units"),
        ("kept", "x", "not like"),
        ("producers", [], "names"),
    ],
)
def test_damaged_json_is_refused(plan, field, value, said):
    fields = json.loads(plan.to_json())
    fields["hidden_units"][0][field] = value
    with pytest.raises(PlanError, match=said):
        alds.Plan.from_json(json.dumps(fields))


def test_saved_and_loaded_to_the_bit(net, plan, tmp_path):
    small = plan.apply(net)
    alds.save(small, tmp_path / "small.safetensors")
    loaded = alds.load(tmp_path / "small.safetensors", build)
    x = torch.randn(3, 10, 16)
    assert torch.equal(loaded(x), small(x))
    assert narrowed_sizes(loaded) == narrowed_sizes(small) and loaded.alds_plan == small.alds_plan
    with pytest.raises(PlanError, match=r"weight shape \(48, 16\)"):
        alds.load(
            tmp_path / "small.safetensors", nn.Sequential(Gated(40, False), Mlp(64), Gated(40, True), nn.Linear(16, 5))
        )


def test_narrowed_alone_is_saved_and_loaded(net, analysis, tmp_path):
    plan = alds.Plan.from_json(_without_ranks(analysis.plan(params=0.5, hidden_units=True)))
    small = plan.apply(net, moments=analysis.moments)
    assert not any(isinstance(m, alds.LowRankLinear) for m in small.modules())
    alds.save(small, tmp_path / "small.safetensors")
    x = torch.randn(3, 10, 16)
    assert torch.equal(alds.load(tmp_path / "small.safetensors", build)(x), small(x))
    assert torch.equal(alds.to_plain(small)(x), small(x))


@pytest.mark.parametrize("budget", [{"params": 3600}, {"memory": 0.5}, {"flops": 0.5}])
def test_other_budgets(net, analysis, data, budget):
    plan = analysis.plan(**budget, hidden_units=True, example_inputs=data[0])
    assert plan.hidden_units and plan.budgets == budget
    for name, (before, after) in plan.costs.items():
        assert after < before
        if name in budget:
            assert after <= 0.5 * before
    assert count(plan.apply(net)) == plan.params


def test_refit_and_refine(net, analysis, plan, data):
    small, x = plan.apply(net), torch.cat(data)
    fitted = plan.apply(net, refit=data)
    assert apart(fitted, net, x) < apart(small, net, x)
    torch.manual_seed(3)
    trained, _ = alds.distill(small, net, data, epochs=2)
    assert apart(trained, net, x) < apart(small, net, x)


def test_refined_as_blocks(data):
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Gated(48, False) for _ in range(3)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    model, options = Chain().eval(), {"data": data, "sensitivity": True, "groups": (1,), "hidden_units": True}
    small = alds.compress(model, params=0.4, **options)
    refined = alds.compress(model, params=0.4, **options, refit=True, refine=30)
    assert small.alds_plan.hidden_units == refined.alds_plan.hidden_units != ()
    assert apart(refined, model, torch.cat(data)) < 0.95 * apart(small, model, torch.cat(data))


def test_a_compressed_model_loses_more(net, plan, data, tmp_path):
    small = plan.apply(net)
    again = alds.compress(small, params=0.8, data=data, sensitivity=True, groups=(1,), hidden_units=True)
    assert count(again) <= 0.8 * count(small)
    alds.save(again, tmp_path / "again.safetensors")
    x = torch.randn(3, 10, 16)
    assert torch.equal(alds.load(tmp_path / "again.safetensors", build)(x), again(x))


def test_pinned_layers_keep_their_units(analysis):
    plan = analysis.plan(params=0.5, hidden_units=True, pins={"0.*": {"min_rank": 4}})
    assert plan.hidden_units and not any(name.startswith("0.") for units in plan.hidden_units for name in units.layers)


def test_another_plan_searches_no_more(analysis, plan, monkeypatch):
    def found(*args):
        raise AssertionError("groups are looked for again")

    monkeypatch.setattr("alds_fast.planning.widths.search.find_hidden_units", found)
    assert analysis.plan(params=0.5, hidden_units=True) == plan
    assert analysis.plan(params=0.3, hidden_units=True).params < plan.params
    with pytest.raises(AssertionError):
        analysis.plan(params=0.5, hidden_units=True, pins={"0.*": "dense"})


def test_a_budget_that_cannot_be_met(analysis):
    with pytest.raises(BudgetError, match="smallest reachable"):
        analysis.plan(params=1e-9, hidden_units=True)


def test_diff_names_what_changed(analysis, plan):
    assert "0.gate" in analysis.plan(params=0.5).diff(plan)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"error": 0.1}, "one budget"),
        ({"params": 0.5, "memory": 0.5}, "one budget"),
        ({"params": 0.5, "method": "l-rank"}, "method='alds'"),
        ({"params": 0.5, "criterion": "output"}, "needs gradients"),
    ],
)
def test_refused(analysis, options, said):
    with pytest.raises(ArgumentError, match=said):
        analysis.plan(**options, hidden_units=True)
    with pytest.raises(ArgumentError, match="True or False"):
        analysis.plan(params=0.5, hidden_units=2)


def test_refused_before_the_work(net, data):
    with pytest.raises(ArgumentError, match="needs gradients"):
        alds.compress(net, params=0.5, hidden_units=True)
    with pytest.raises(ArgumentError, match="needs gradients"):
        alds.compress(net, params=0.5, data=data, hidden_units=True)


def test_a_search_for_quality_has_them_too(net, data):
    def evaluate(model):
        return -apart(model, net, data[0])

    small = alds.compress(
        net, quality=-0.2, evaluate=evaluate, data=data, sensitivity=True, groups=(1,), hidden_units=True
    )
    assert small.alds_plan.hidden_units and evaluate(small) >= -0.2
