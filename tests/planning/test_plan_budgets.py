"""Plans under shares of operations and under several budgets, as a user asks for them."""

import math
import warnings

import numpy as np
import pytest
import torch
from support.models import count, images, small_net
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import alds_fast as alds
from alds_fast.allocation.pareto import p_norm
from alds_fast.errors import ArgumentError, BudgetError, ModelError


def flops(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def analysis():
    return alds.analyze(small_net())


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("p", [2, math.inf])
def test_a_budget_of_operations_is_never_exceeded(analysis, keep, p):
    model, x = small_net(), images()
    plan = analysis.plan(flops=keep, example_inputs=x, p=p)
    small = plan.apply(model)
    assert flops(small, x) <= keep * flops(model, x)
    assert plan.budget == f"flops={keep}" and plan.gap >= 0 and (p < math.inf or plan.gap == 0)
    assert small(x).shape == model(x).shape


def test_operations_are_spent(analysis):
    """The solver's own count is torch's: the last rank that would still fit is taken."""
    model, x = small_net(), images()
    used = [flops(analysis.plan(flops=k, example_inputs=x).apply(model), x) / flops(model, x) for k in (0.3, 0.6)]
    assert 0.29 < used[0] <= 0.3 and 0.59 < used[1] <= 0.6


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.4, 0.9), (0.9, 0.4), (1.0, 1.0)])
def test_two_budgets_hold_at_once(analysis, shares):
    model, x = small_net(), images()
    plan = analysis.plan(params=shares[0], flops=shares[1], example_inputs=x)
    small = plan.apply(model)
    assert count(small) == plan.params <= shares[0] * count(model)
    assert flops(small, x) <= shares[1] * flops(model, x)
    single = [analysis.plan(params=shares[0]), analysis.plan(flops=shares[1], example_inputs=x)]
    norms = [p_norm(np.array([row.error for row in made.layers]), 4.0) for made in (*single, plan)]
    assert {made.p for made in (*single, plan)} == {4.0}
    assert all(norm / (1 + made.gap) <= norms[2] * (1 + 1e-9) for made, norm in zip(single, norms, strict=False))
    assert plan.budget == f"params={shares[0]:g}, flops={shares[1]:g}"
    assert plan.budgets == dict(zip(("params", "flops"), shares, strict=True)) and not plan.exact
    assert plan.error / (1 + plan.gap) <= plan.error and plan.gap < 0.2
    if shares == (1.0, 1.0):
        assert plan.error == 0.0


def test_compress_takes_budgets_and_keyword_inputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_net()

        def forward(self, picture):
            return self.inner(picture)

    model = Net().eval()
    small = alds.compress(model, flops=0.5, params=0.6, example_inputs={"picture": images()})
    assert flops(small, images()) <= 0.5 * flops(model, images()) and count(small) <= 0.6 * count(model)


def test_layers_that_are_never_called_stay_dense():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.used(x)

    plan = alds.analyze(Spare()).plan(flops=0.5, example_inputs=torch.randn(2, 32))
    assert {row.name: row.rank is None for row in plan.layers} == {"used": False, "spare": True}
    assert plan.layers[1].reason == "it is not called"


def test_planning_leaves_the_model_as_it_was():
    model = small_net().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    alds.compress(model, flops=0.5, example_inputs=images())
    assert all(m.training for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_unreachable_budgets_are_named(analysis):
    x = images()
    with pytest.raises(BudgetError, match=r"flops=0\.01 cannot be met: the smallest reachable is flops=(0\.\d+)") as e:
        analysis.plan(flops=0.01, example_inputs=x)
    reachable = float(str(e.value).split("reachable is flops=")[1].split(",")[0])
    assert analysis.plan(flops=reachable, example_inputs=x).budget == f"flops={reachable:g}"
    with pytest.raises(BudgetError, match=r"params=0\.001 cannot be met"):
        analysis.plan(flops=0.5, params=0.001, example_inputs=x)


def test_budgets_that_exclude_each_other_are_named():
    """Decoding is small but sees every input position of the strided axis, encoding the other way round."""
    model = nn.Conv1d(64, 4, 5, stride=8, padding=2, bias=False)
    analysis, x = alds.analyze(model), torch.randn(1, 64, 64)
    assert analysis.plan(params=0.07).layers[0].scheme == 3  # 84 of 1280 parameters, 532 of 1280 operations
    assert analysis.plan(flops=0.27, example_inputs=x).layers[0].scheme == 0  # 324 of both
    with pytest.raises(BudgetError, match=r"params=0\.07 and flops=0\.27 cannot be met at once") as caught:
        analysis.plan(params=0.07, flops=0.27, example_inputs=x)
    assert "keeping the others, the smallest found is params=0.2532 or flops=0.4157" in str(caught.value)
    assert analysis.plan(params=0.2532, flops=0.27, example_inputs=x).layers[0].rank == 1
    assert analysis.plan(params=0.07, flops=0.4157, example_inputs=x).layers[0].rank == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"flops": 0.5}, ArgumentError, "flops= needs example_inputs="),
        ({"latency": 0.5, "params": 0.5}, ArgumentError, "latency= needs example_inputs="),
        ({"flops": 0.5, "example_inputs": 3}, ArgumentError, "example_inputs is a int: expected a tensor"),
        ({"flops": 0.5, "example_inputs": torch.randn(2, 5)}, ModelError, "example_inputs did not run"),
        ({"flops": 1.5, "example_inputs": images()}, BudgetError, r"flops=1\.5 is outside \(0, 1\]"),
        ({"latency": "fast", "example_inputs": images()}, BudgetError, r"latency='fast' is outside \(0, 1\]"),
        ({"flops": 0.5, "error": 0.5, "example_inputs": images()}, BudgetError, "got error= with flops"),
        (
            {"latency": 0.5, "method": "svd", "example_inputs": images()},
            ArgumentError,
            "needs params=, flops= or memory=, one alone",
        ),
        ({"params": 0.5, "cache": 3}, ArgumentError, "cache=3: expected a folder"),
    ],
)
def test_bad_options_are_refused(analysis, options, error, message):
    for call in (analysis.plan, lambda **o: alds.compress(small_net(), **o)):
        with pytest.raises(error, match=message):
            call(**options)


def test_a_model_without_operations_is_refused():
    with pytest.raises(ArgumentError, match="torch counts none for this model"):
        alds.analyze(nn.ReLU()).plan(flops=0.5, example_inputs=torch.ones(2))


@pytest.mark.filterwarnings("ignore:on samples kept aside:UserWarning")
def test_an_error_that_bounds_nothing_is_warned_of(analysis, recwarn):
    analysis.plan(error=1, importance={"*": 10})
    seen = alds.analyze(small_net(), data=[images()], sensitivity=True, groups=(1,))
    seen.plan(error=0.9, criterion="output")
    assert not any("bounds nothing" in str(w.message) for w in recwarn)
    with pytest.warns(UserWarning, match=r"error=1 bounds nothing: .* with errors up to 0\.\d+; give less") as caught:
        analysis.plan(error=1)
    assert caught[0].filename == __file__
    loosest = max(row.error for row in seen.plan(params=471).layers)
    with pytest.warns(UserWarning, match="error=0.* bounds nothing: every layer gets the fewest parameters"):
        seen.plan(error=float(loosest))


def test_a_budget_that_leaves_next_to_nothing_of_layers_is_warned_of(analysis, recwarn):
    analysis.plan(params=0.6)
    analysis.plan(error=0.95)
    analysis.sweep([0.6, 0.1])
    assert not recwarn.list
    message = r"next to nothing of some layers: errors above 0\.9 of .*'3'.*pins= with min_keep"
    with pytest.warns(UserWarning, match=message) as caught:
        plan = analysis.plan(params=0.1)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=message):
        analysis.plan(params=0.1, importance={"*": 0.01})
    assert plan.error > 0.9
    by_gradients = alds.analyze(small_net(), data=[images()], sensitivity=True, groups=(1,))
    with warnings.catch_warnings(record=True) as other:
        warnings.simplefilter("always")
        by_gradients.plan(params=0.1)
    assert not any("next to nothing" in str(w.message) for w in other)
