"""Convolutions that are factorised without data keep what they return for a constant input."""

import json
import math

import pytest
import torch
from support.models import small_net
from torch import nn

import alds_fast as alds
from alds_fast.criteria import WEIGHT_CRITERIA
from alds_fast.errors import PlanError
from alds_fast.factors import Choice, factorize
from alds_fast.layers import weight_shape
from alds_fast.linalg import Decomposition

B = 1 / (math.pi - 1)
LAYERS = [
    (lambda: nn.Conv2d(6, 5, (3, 2)), [(scheme, k) for scheme in range(4) for k in (1, 2, 3)]),
    (lambda: nn.Conv2d(8, 6, 3, groups=2), [(0, 1), (0, 2), (3, 2)]),
    (lambda: nn.Conv1d(4, 7, 5), [(0, 1), (3, 2)]),
]
FOLDS = [(layer, scheme, groups) for layer, folds in LAYERS for scheme, groups in folds]


def factorized(layer, decomposition, **options):
    """The low-rank layer that takes the layer's place, and its report."""
    model = nn.Sequential(layer)
    small, reports = factorize(model, [Choice("0", weight_shape(layer), decomposition)], exact=True, **options)
    return small[0], reports["0"]


def energy(layer, low):
    """E ||(W - W_hat) x||^2 for inputs of covariance I and mean sqrt(b) 1, group by group."""
    lost = (layer.weight.detach() - low.dense_weight()).flatten(1)
    return lost.square().sum() + B * lost.sum(1).square().sum()


def test_by_hand():
    """diag(2, 1) at rank 1: the second filter's response to (1, 1) goes to the only channel, 1 / pi of it."""
    layer = nn.Conv2d(2, 2, 1, bias=False)
    layer.weight.data = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).view(2, 2, 1, 1)
    low, report = factorized(layer, Decomposition(0, 1, 1), constants=True)
    expected = torch.tensor([[2.0, 0.0], [1 / math.pi, 0.0]])
    torch.testing.assert_close(low.dense_weight().view(2, 2), expected)
    assert report.error == pytest.approx(math.sqrt((1 + 1 / math.pi**2) / 5))


@pytest.mark.parametrize("build, scheme, groups", FOLDS)
def test_the_decoder_is_the_best_for_its_encoder(build, scheme, groups):
    torch.manual_seed(0)
    layer = build().double()
    plain, _ = factorized(layer, Decomposition(scheme, groups, 1))
    low, report = factorized(layer, Decomposition(scheme, groups, 1), constants=True)
    value = energy(layer, low)
    (gradient,) = torch.autograd.grad(value, low.decoder)
    assert value < energy(layer, plain)
    assert gradient.abs().max() < 1e-9 * value
    reached = (layer.weight - low.dense_weight()).detach().norm() / layer.weight.norm()
    assert report.error == pytest.approx(float(reached), rel=1e-9)


def test_outputs_on_rectified_inputs_are_nearer():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(32, 32, 3, bias=False), torch.randn(8, 32, 9, 9).relu()
    both = [factorized(layer, Decomposition(0, 1, 8), constants=on)[0] for on in (False, True)]
    plain, kept = (float((layer(x) - low(x)).norm()) for low in both)
    assert kept < 0.9 * plain


def test_a_zero_weight_and_full_rank_stay_what_they_are():
    layer = nn.Conv2d(4, 4, 3, bias=False)
    full, _ = factorized(layer, Decomposition(0, 1, 4), constants=True)
    torch.testing.assert_close(full.dense_weight(), layer.weight)
    nn.init.zeros_(layer.weight)
    assert not factorized(layer, Decomposition(0, 1, 2), constants=True)[0].dense_weight().any()


def is_kept(model, **options):
    """Whether the decoders of convolutions differ from those of the weight alone."""
    plan = alds.analyze(model).plan(**{"params": 0.5, **options})
    plain, _ = factorize(model, [row.choice for row in plan.layers if row.choice], exact=plan.exact)
    small, names = plan.apply(model), [row.name for row in plan.layers if row.choice]
    same = {name: torch.equal(small.get_submodule(name).decoder, plain.get_submodule(name).decoder) for name in names}
    kinds = {isinstance(model.get_submodule(name), nn.Linear): not equal for name, equal in same.items()}
    assert not kinds.get(True, False)  # linear layers never
    return kinds[False]


def test_which_plans_keep_them():
    model = small_net()
    assert is_kept(model) and is_kept(model, p=2.0) and is_kept(model, align=2)
    assert not is_kept(model, bias_correction=False)
    assert not is_kept(model, params=None, error=0.5)
    assert not any(is_kept(model, criterion=other) for other in WEIGHT_CRITERIA if other != "frobenius")
    assert not any(is_kept(model, method=other) for other in ("svd", "alds-heuristic"))


def test_a_plan_that_was_read_does_the_same():
    model = small_net()
    plan = alds.analyze(model).plan(params=0.5)
    first, again = plan.apply(model), alds.Plan.from_json(plan.to_json()).apply(model)
    assert plan.keeps_constants
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_plans_of_before_and_damaged_ones():
    """A plan that was written without the field gives the factors that it gave."""
    model = small_net()
    text = alds.analyze(model).plan(params=0.5).to_json()
    old = {name: value for name, value in json.loads(text).items() if name != "keeps_constants"}
    before = alds.analyze(model).plan(params=0.5, bias_correction=False).apply(model)
    plan = alds.Plan.from_json(json.dumps(old))
    assert not plan.keeps_constants
    for a, b in zip(plan.apply(model).parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(PlanError, match="keeps_constants=1 is not true or false"):
        alds.Plan.from_json(json.dumps({**old, "keeps_constants": 1}))
