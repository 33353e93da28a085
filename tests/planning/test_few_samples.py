"""What was calibrated on few or repeated samples is not worse on others than what was made without data."""

import warnings

import pytest
import torch
from support.models import images, small_net
from torch import nn

import alds_fast as alds
from alds_fast.errors import ArgumentError

WIDTH = 128


def falling(filters, columns):
    """A weight whose singular values fall slowly."""
    u, v = (torch.linalg.qr(torch.randn(n, n))[0] for n in (filters, columns))
    least = min(filters, columns)
    return 3 * (u[:, :least] / torch.arange(1, least + 1) ** 0.7) @ v[:, :least].T


@pytest.fixture(scope="module")
def problem():
    """A network, and samples of few directions: much to learn from many, nothing from a few."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 32))
    for layer in net[::2]:
        layer.weight.data = falling(*layer.weight.shape)
    mix = torch.randn(20, WIDTH) / 4
    samples = torch.randn(1200, 20) @ mix + 0.05 * torch.randn(1200, WIDTH)
    return net, samples[:200], samples[200:]


@torch.no_grad()
def apart(net, small, x):
    return float((small(x) - net(x)).norm() / net(x).norm())


def compressed(net, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return alds.compress(net, **options)


DATA = {
    "one": lambda x: [x[:1]],
    "two": lambda x: [x[:2]],
    "three batches of one": lambda x: list(x[:3].split(1)),
    "four": lambda x: [x[:4]],
    "eight": lambda x: [x[:8]],
    "one eight times": lambda x: [x[:1].repeat(8, 1)],
    "one in eight batches": lambda x: [x[:1]] * 8,
    "two eight times": lambda x: [x[:2].repeat(8, 1)],
    "a constant": lambda x: [torch.ones(8, WIDTH)],
    "zeros": lambda x: [torch.zeros(8, WIDTH)],
}


@pytest.mark.parametrize("keep", [0.6, 0.3])
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_never_worse_than_without_data(problem, data, keep):
    net, x, fresh = problem
    free = apart(net, alds.compress(net, params=keep), fresh)
    for sensitivity in (False, True):
        for refit in (False, True):
            small = compressed(net, params=keep, data=data(x), sensitivity=sensitivity, refit=refit)
            assert apart(net, small, fresh) < 1.05 * free


def sequences(count, tokens, mix):
    """Samples whose tokens are alike, more than those of two samples are."""
    return (torch.randn(count, tokens, 64) / 2 + 2 * torch.randn(count, 1, 64)) @ mix


@pytest.mark.parametrize(("count", "times"), [(1, 1), (1, 8), (2, 1), (2, 8), (3, 1), (4, 1), (8, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_of_one_sample_are_not_taken_for_samples(count, times, seed):
    torch.manual_seed(seed)
    layers = nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 32)
    net, mix = nn.Sequential(*layers), torch.randn(64, 64) * torch.arange(1, 65.0) ** -0.5
    fresh, data = sequences(400, 16, mix), sequences(count, 16, mix).repeat(times, 1, 1)
    free = apart(net, alds.compress(net, params=0.5), fresh)
    for options in ({}, {"refit": True}, {"sensitivity": True}, {"sensitivity": True, "refit": True}):
        assert apart(net, compressed(net, params=0.5, data=[data], **options), fresh) < 1.05 * free


def test_many_samples_are_much_better_and_their_errors_those_of_others(problem):
    net, x, fresh = problem
    free = apart(net, alds.compress(net, params=0.5), fresh)
    small = alds.compress(net, params=0.5, data=[x], sensitivity=True)
    plan = small.alds_plan
    assert apart(net, small, fresh) < 0.5 * free
    assert plan.held_out is not None and 0.3 * plan.error < plan.held_out < 1.5 * plan.error  # the latter is cautious
    assert "held out" in str(plan) and "on samples kept aside" in str(plan)
    assert alds.Plan.from_json(plan.to_json()).held_out == plan.held_out


def test_held_out_errors_are_those_of_the_samples_kept_aside(problem):
    """By hand, for the first layer: the factors of the plan on the rows that were not used."""
    net, x, _ = problem
    analysis = alds.analyze(net, data=[x])
    plan = analysis.plan(params=0.5)
    row, held = plan.layers[0], analysis.moments["0"].held[:, 0]
    assert torch.equal(held, x[-25:]) and analysis.moments["0"].rows == 175
    dense, cut = (m.double() for m in (net[0], plan.apply(net)[0]))
    y, z = (layer(held.double()) for layer in (dense, cut))
    lost = (y - z).norm() / (y - dense.bias).norm()
    net.float()
    assert row.held_out == pytest.approx(float(lost.detach()), rel=1e-3)


def test_too_few_samples_are_said(problem):
    net, x, _ = problem
    with pytest.warns(UserWarning, match=r"too few samples that differ .*\(criterion='frobenius'\)"):
        plan = alds.analyze(net, data=[x[:1].repeat(8, 1)]).plan(params=0.5)
    assert plan.criterion == "frobenius" and plan.held_out is None
    with pytest.warns(UserWarning, match="refit= left 3 of 3 layers as they were"):
        plan.apply(net, refit=[x[:2]])


def test_samples_kept_aside_that_are_of_another_kind_are_said(problem):
    net, x, _ = problem
    with pytest.warns(
        UserWarning, match="on samples kept aside the layers' errors are .*, larger than .* pass more samples"
    ):
        alds.analyze(net, data=[torch.cat([x, 3 * torch.randn(28, WIDTH)])], sensitivity=True).plan(params=0.5)


def test_held_out_share_is_checked():
    for share in (1, -0.1, "half", True):
        with pytest.raises(ArgumentError, match=r"held_out=.* is outside \[0, 1\)"):
            alds.analyze(small_net(), data=[images(4)], held_out=share)
    assert alds.analyze(small_net(), data=[images(8)], held_out=0).plan(params=0.5).held_out is None


def test_convolutions_state_both_errors():
    plan = alds.analyze(small_net(), data=[images(16), images(16, 2)], sensitivity=True).plan(params=0.6)
    assert all(row.held_out is not None for row in plan.layers if row.rank)
