"""Hidden units: which layers have some between them, which go first, and what the others take up."""

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast.criteria import (
    Basis,
    compensated,
    find_hidden_units,
    kept_units,
    removal_errors,
    removal_order,
)
from alds_fast.layers import decomposable, find_layers


class Mlp(nn.Module):
    """fc1 and fc2 around hidden units, which ``between`` changes."""

    def __init__(self, between=torch.relu, width=24):
        super().__init__()
        self.fc1, self.fc2, self.between = nn.Linear(8, width), nn.Linear(width, 8), between

    def forward(self, x):
        return x + self.fc2(self.between(self.fc1(x)))


class Gated(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.gate, self.up = nn.Linear(8, width, bias=False), nn.Linear(8, width, bias=False)
        self.down = nn.Linear(width, 8, bias=False)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class UsedTwice(Mlp):
    def forward(self, x):
        hidden = self.fc1(x)
        return x + self.fc2(hidden) + hidden[..., :8]


class InHeads(nn.Module):
    """Attention whose values go by heads of a fixed number: they cannot be any number of units."""

    def __init__(self):
        super().__init__()
        self.v, self.o = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x):
        return self.o(self.v(x).unflatten(-1, (4, 6)).flatten(-2))


def groups_of(model, *inputs):
    torch.manual_seed(0)
    found = find_hidden_units(model.eval(), decomposable(find_layers(model)), inputs or (torch.randn(3, 8),), "x")
    return [(group.producers, group.consumer, group.count) for group in found]


def test_found_by_runs():
    model = nn.Sequential(Mlp(), Gated(), Mlp(nn.GELU(), 40))
    assert groups_of(model) == [
        (("0.fc1",), "0.fc2", 24), (("1.gate", "1.up"), "1.down", 24), (("2.fc1",), "2.fc2", 40),
    ]  # fmt: skip
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "model",
    [
        Mlp(nn.LayerNorm(24)),
        Mlp(nn.Softmax(-1)),
        Mlp(lambda x: x.flip(-1)),
        Mlp(lambda x: x.cumsum(-1)),
        UsedTwice(),
        InHeads(),
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)),
    ],
)
def test_units_that_cannot_go_alone_are_none(model):
    assert groups_of(nn.Sequential(Mlp(), model))[:1] == [(("0.fc1",), "0.fc2", 24)]
    assert len(groups_of(nn.Sequential(Mlp(), model))) == 1


class Strict(Mlp):
    """Refuses hidden units that are 0, as half of them are in a changed run."""

    def forward(self, x):
        hidden = self.fc1(x)
        if not bool(hidden.all()):
            raise ValueError("a unit is 0")
        return x + self.fc2(hidden)


class Counted(Mlp):
    """Returns as many numbers as there are hidden units."""

    def forward(self, x):
        return super().forward(x).sum() + torch.zeros(self.fc1.out_features if self.fc1.weight.shape[0] == 24 else 1)


def test_a_group_that_fails_takes_no_other_with_it():
    assert groups_of(nn.Sequential(Mlp(), Strict())) == [(("0.fc1",), "0.fc2", 24)]
    assert groups_of(Counted()) == []


def test_layers_called_twice_or_tied_are_left():
    twice, tied = Mlp(), nn.Sequential(Mlp(), Mlp())
    tied[1].fc1.weight = tied[0].fc1.weight
    assert groups_of(nn.Sequential(twice, twice)) == []
    assert groups_of(tied) == []


def test_of_a_plain_chain_the_widest_come_first():
    model = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 4))
    assert groups_of(model) == [(("0",), "2", 30)]


@pytest.fixture(scope="module", params=[False, True], ids=["no bias", "bias"])
def weighted(request):
    """A consumer of 12 units, some of which the others foretell, its weighting and the rows that it was made from."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 7, bias=request.param)).double()
    x = torch.randn(400, 6).double()
    analysis = alds.analyze(net, data=x.split(40), sensitivity=True, held_out=0)
    layer = next(x for x in decomposable(find_layers(net)) if x.name == "2")
    basis = Basis("sensitivity", analysis.moments)
    basis._shares["2"] = 0.0  # nothing goes to the identity, so that the moment is that of these rows
    return basis.weighting(layer), net[:2](x).detach()


def lost(w, kept):
    """Of E ||H (W x - W' x_S)||^2 the least over W': by least squares under C itself."""
    c, weight = w.second[0], w.weight[0]
    new = torch.linalg.lstsq(c[kept][:, kept], c[kept] @ weight.mT).solution.mT
    e = weight.clone()
    e[:, kept] -= new
    e = w.root[0] @ e
    return float(torch.trace(e @ c @ e.mT))


def test_what_is_left_takes_up_what_it_can(weighted):
    w, _ = weighted
    kept = torch.tensor([0, 2, 3, 5, 8, 9])
    order = torch.tensor([j for j in range(12) if j not in kept])
    assert kept_units(order, 12, 6).tolist() == kept.tolist()
    (error,) = removal_errors(w, order, [6])
    assert error**2 == pytest.approx(lost(w, kept), rel=0.01)  # of the ridge


def test_each_unit_that_goes_is_the_cheapest(weighted):
    w, _ = weighted
    order, there = removal_order(w, 5).tolist(), set(range(12))
    for unit in order[:4]:
        costs = {j: lost(w, torch.tensor(sorted(there - {j}))) for j in there}
        assert costs[unit] <= 1.05 * min(costs.values())
        there -= {unit}


def test_the_bias_takes_up_the_mean(weighted):
    w, hidden = weighted
    kept = torch.arange(6)
    fitted = compensated(w, kept)
    apart = hidden @ w.weight[0].mT - hidden[:, kept] @ fitted.weight.mT - fitted.shift
    assert bool(fitted.shift.any()) == w.centred
    if w.centred:
        assert float(apart.mean(0).norm()) < 0.05 * float(apart.norm(dim=1).mean())


def test_units_that_are_always_zero_go_first():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 7, bias=False))
    with torch.no_grad():
        net[0].bias[[3, 7]] = -100.0
    analysis = alds.analyze(net, data=torch.randn(200, 6).split(20), sensitivity=True)
    layer = next(x for x in decomposable(find_layers(net)) if x.name == "2")
    order = removal_order(Basis("sensitivity", analysis.moments).weighting(layer), 8)
    assert set(order[:2].tolist()) == {3, 7}
