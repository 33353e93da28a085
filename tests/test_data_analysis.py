"""Plans from data: criteria, defaults, bias correction, importance, JSON, saving, the PCA baseline, errors."""

import math

import pytest
import torch
from helpers import images, small_net
from torch import nn

import alds_fast as alds
from alds_fast.errors import ArgumentError, LayerNotFoundError, PlanError


@pytest.fixture(scope="module")
def net():
    return small_net()


@pytest.fixture(scope="module")
def analysis(net):
    return alds.analyze(net, data=[images(16, 3), images(16, 4)], sensitivity=True)


def relative_output_error(net, small, name, x):
    """||W x - W_hat x|| / ||W x|| of a layer on the inputs that it gets in the dense network, biases left out."""
    seen = []
    handle = net.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        net(x)
        handle.remove()
        dense, cut = net.get_submodule(name), small.get_submodule(name)
        plain = [m(seen[0]) - m(torch.zeros_like(seen[0])) for m in (dense, cut)]
    return float((plain[0] - plain[1]).norm() / plain[0].norm())


def test_output_errors_are_those_of_the_layers_outputs():
    """On one slice, no bias correction, all patches seen: exact for every layer of the plan."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 25)).double()
    x = torch.randn(200, 20).double()
    plan = alds.analyze(net, data=x.split(50)).plan(params=0.5, bias_correction=False)
    assert plan.criterion == "output" and not plan.bias_correction
    small, reduced = plan.apply(net), [row for row in plan.layers if row.rank]
    assert len(reduced) >= 2
    for row in reduced:
        measured = relative_output_error(net, small, row.name, x)
        assert measured == pytest.approx(small.alds_factors[row.name].data_error, rel=1e-6)
        assert measured <= row.error * (1 + 1e-6)


def test_bias_correction_gives_outputs_their_mean():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(20, 30)).double(), torch.randn(100, 20).double() + 1
    analysis = alds.analyze(net, data=[x])
    for correct in (True, False):
        small = analysis.plan(params=0.4, bias_correction=correct).apply(net)
        off = float((net(x) - small(x)).mean(0).abs().max().detach())
        assert off < 1e-9 if correct else off > 1e-3
    assert analysis.plan(params=0.4).error <= analysis.plan(params=0.4, bias_correction=False).error


def test_a_bias_that_is_shared_is_left_alone():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)), torch.randn(50, 12) + 1
    net[2].bias = net[0].bias
    small = alds.analyze(net, data=[x]).plan(params=0.5).apply(net)
    assert small[0].bias is small[2].bias and torch.equal(small[0].bias, net[0].bias)


def test_defaults_follow_what_was_collected(net, analysis):
    plan = analysis.plan(params=0.5)
    assert (plan.criterion, plan.p, plan.bias_correction) == ("sensitivity", 2.0, True)
    assert analysis.plan(params=0.5, method="svd").criterion == "frobenius"
    assert analysis.plan(params=0.5, method="pca").criterion == "output"
    seen = alds.analyze(net, data=[images(8)]).plan(params=0.5)
    assert (seen.criterion, seen.p) == ("output", 4.0)
    plain = alds.analyze(net)
    assert (plain.plan(params=0.5).criterion, plain.plan(params=0.5).p) == ("frobenius", 4.0)
    assert math.isinf(plain.plan(error=0.5).p) and math.isinf(plain.plan(params=0.5, method="svd").p)


@pytest.mark.parametrize("criterion", ["output", "output-bound", "sensitivity"])
def test_every_criterion_plans_and_applies(net, analysis, criterion):
    plan = analysis.plan(params=0.5, criterion=criterion)
    small = plan.apply(net)
    assert sum(p.numel() for p in small.parameters()) == plan.params <= 0.5 * analysis.params
    for name, report in small.alds_factors.items():
        row = next(row for row in plan.layers if row.name == name)
        assert report.method == "weighted" and report.data_error <= row.error * (1 + 1e-6) + 1e-9
    assert torch.isfinite(small(images())).all()


def test_a_plan_from_json_needs_the_moments(net, analysis):
    plan = analysis.plan(params=0.5)
    again = alds.Plan.from_json(plan.to_json())
    assert again == plan
    with pytest.raises(PlanError, match=r"criterion 'sensitivity' needs moments.* moments=analysis.moments"):
        again.apply(net)
    x = images()
    assert torch.equal(again.apply(net, moments=analysis.moments)(x), plan.apply(net)(x))
    text = plan.to_json().replace('"bias_correction": true', '"bias_correction": 3')
    with pytest.raises(PlanError, match="bias_correction=3 is not true or false"):
        alds.Plan.from_json(text)


def test_saved_and_loaded(net, analysis, tmp_path):
    small = analysis.plan(params=0.5).apply(net)
    alds.save(small, tmp_path / "small.safetensors")
    loaded = alds.load(tmp_path / "small.safetensors", net)
    assert torch.equal(loaded(images()), small(images())) and loaded.alds_plan.criterion == "sensitivity"


def test_importance_moves_the_budget():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    analysis = alds.analyze(net, groups=(1,))
    even = {row.name: row.rank for row in analysis.plan(params=0.5).layers}
    tilted = {row.name: row.rank for row in analysis.plan(params=0.5, importance={"0": 10.0}).layers}
    assert tilted["0"] is None or tilted["0"] > even["0"]
    assert tilted["1"] < even["1"]


def test_a_layer_that_data_never_reach_stays_dense():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(20, 20), nn.Linear(20, 20)

        def forward(self, x):
            return self.used(x)

    plan = alds.analyze(Branch(), data=[torch.randn(30, 20)]).plan(params=0.8)
    reasons = {row.name: row.reason for row in plan.layers}
    assert reasons == {"used": None, "idle": "it is not called with data="}


class TwoHeads(nn.Module):
    """What is returned first does not depend on the second head."""

    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 16)

    def forward(self, x):
        hidden = self.body(x).relu()
        return self.first(hidden), self.second(hidden)


def test_a_layer_that_what_matters_does_not_depend_on_is_free():
    torch.manual_seed(0)
    net, x = TwoHeads(), torch.randn(64, 24)
    analysis = alds.analyze(net, data=[x], sensitivity=True)
    assert not analysis.moments["second"].gradient.any()
    plan = analysis.plan(params=0.7)
    rows = {row.name: row for row in plan.layers}
    assert (rows["second"].rank, rows["second"].error) == (1, 0.0) and rows["first"].error > 0
    assert all(y.isfinite().all() for y in plan.apply(net)(x))
    both = alds.analyze(net, data=[x], sensitivity=lambda output, batch: torch.cat(output, 1))
    assert {row.name: row for row in both.plan(params=0.7).layers}["second"].rank != 1


def test_no_more_than_eight_slices_unless_asked_for():
    net, x = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU()), torch.randn(4, 16, 6, 6)
    found = alds.analyze(net, data=[x]).plan(params=0.5)
    assert found.layers[0].groups <= 8
    assert alds.analyze(net, groups=(16,), data=[x]).plan(params=0.6).layers[0].groups == 16


def test_pca_by_hand():
    """Two diagonal layers on inputs of known variances: the outputs' covariances are diagonal, too.

    Layer 0 has variances 8, 1, .5, .1 and layer 1 of its own 4, 4, 4, 4 after a diagonal scaling; rank 1 costs 8 of 16
    in each. At half of the parameters both must go to rank 1: 8 + 8 = 16 of 32.
    """
    first, second = torch.tensor([8.0, 1.0, 0.5, 0.1]).double(), torch.tensor([0.5, 4.0, 8.0, 40.0]).double()
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4))
        net[1].weight.copy_(torch.diag(second.sqrt()))
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 4)
    analysis = alds.analyze(net, data=[signs * first.sqrt()])
    plan = analysis.plan(params=0.5, method="pca")
    assert [(row.scheme, row.groups, row.rank) for row in plan.layers] == [(0, 1, 1)] * 2
    # errors: sqrt of the share of energy lost; layer 1 has energies 4, 4, 4, 4
    assert [row.error for row in plan.layers] == pytest.approx([math.sqrt(1.6 / 9.6), math.sqrt(12 / 16)])
    small = plan.apply(net)
    kept = small[0].dense_weight()
    torch.testing.assert_close(kept, torch.diag(torch.tensor([1.0, 0, 0, 0]).double()), atol=1e-12, rtol=0)
    with pytest.raises(ArgumentError, match="is made for criterion='output', not 'operator'"):
        analysis.plan(params=0.5, method="pca", criterion="operator")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"criterion": "output"}, ArgumentError, r"criterion='output' needs data: analyze\(model, data=batches\)"),
        ({"criterion": "sensitivity"}, ArgumentError, "needs gradients"),
        ({"criterion": "entropy"}, ArgumentError, "criterion='entropy' is not one of frobenius, .*sensitivity"),
        ({"method": "pca"}, ArgumentError, "method='pca' needs data"),
        ({"bias_correction": 1}, ArgumentError, "bias_correction=1 is not True or False"),
        ({"importance": [1]}, ArgumentError, "importance is a list"),
        ({"importance": {"8": -1}}, ArgumentError, r"importance\['8'\]=-1 is outside"),
        ({"importance": {"nope": 1}}, LayerNotFoundError, "importance= names 'nope'"),
    ],
)
def test_refusals(net, options, error, message):
    with pytest.raises(error, match=message):
        alds.analyze(net).plan(params=0.5, **options)


def test_compress_takes_data(net):
    small = alds.compress(net, params=0.5, data=[images(8)], criterion="output", p=4)
    assert small.alds_plan.p == 4 and small.alds_plan.criterion == "output"
