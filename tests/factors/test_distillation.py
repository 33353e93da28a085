"""distill(): the whole compressed model trained for the dense one's output, never worse on what is kept aside."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast import errors


class Language(nn.Module):
    """Tokens to logits, as an object that names them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.e, self.a, self.n, self.b = nn.Embedding(20, 24), nn.Linear(24, 48), nn.LayerNorm(48), nn.Linear(48, 20)

    def forward(self, ids, attention_mask=None):
        x = self.e(ids)
        return SimpleNamespace(loss=None, logits=3 * self.b(self.n(self.a(x).tanh())))


def tokens(count=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(20, (4, 6), generator=generator) for _ in range(count)]


def divergence(model, small, data):
    with torch.no_grad():
        p, q = (torch.cat([net(x).logits for x in data]).log_softmax(-1) for net in (model, small))
    return float((p.exp() * (p - q)).sum(-1).mean())


def unchanged(before, model):
    return all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.fixture(scope="module")
def pair():
    model = Language().eval()
    return model, alds.compress(model, params=0.7)


def test_the_divergence_falls_and_nothing_else_changes(pair):
    model, small = pair
    states = [{name: value.clone() for name, value in net.state_dict().items()} for net in pair]
    told = []
    better, report = alds.distill(small, model, tokens(), epochs=20, lr=5e-2, progress=lambda *args: told.append(args))
    assert report.kl and report.before == pytest.approx(divergence(model, small, tokens()[-1:]), rel=1e-4)
    assert report.after == pytest.approx(divergence(model, better, tokens()[-1:]), rel=1e-4)
    fresh = tokens(20, seed=2)
    assert divergence(model, better, fresh) < 0.7 * divergence(model, small, fresh)
    assert all(map(unchanged, states, pair))
    assert torch.equal(better.e.weight, model.e.weight) and not torch.equal(better.n.weight, small.n.weight)
    assert all(p.requires_grad and p.grad is None for p in better.parameters()) and not better.training
    assert told[-1] == ("passes of distill", 20, 20) and len(told) == 20
    assert {r.method for r in better.alds_factors.values()} == {"distilled"}


def test_what_gets_worse_is_as_it_was(pair):
    model, small = pair
    same, report = alds.distill(small, model, tokens(), epochs=2, lr=1e3)
    assert report.after == report.before and unchanged(small.state_dict(), same)
    assert same.alds_factors == small.alds_factors


def test_padding_does_not_count(pair):
    model, small = pair
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[:, 4:] = 0
    data = [{"ids": x, "attention_mask": mask} for x in tokens()]
    garbage = [{"ids": b["ids"] * mask, "attention_mask": mask} for b in data]
    a, b = (alds.distill(small, model, d, epochs=1)[1] for d in (data, garbage))
    assert a == b
    assert alds.distill(small, model, garbage, epochs=1, mask=None)[1].before != b.before


def test_outputs_that_are_no_logits_by_their_distance():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 8)).eval()
    small = alds.compress(model, params=0.6)
    data = [torch.randn(32, 24) for _ in range(8)]
    better, report = alds.distill(small, model, data, epochs=10, lr=5e-2)
    with torch.no_grad():
        before, after = (float((net(data[-1]) - model(data[-1])).norm() / model(data[-1]).norm())
                         for net in (small, better))  # fmt: skip
    assert not report.kl and after < 0.8 * before
    assert (report.before, report.after) == pytest.approx((before, after), rel=1e-4)
    assert alds.distill(small, model, data, epochs=1, kl=True)[1].kl


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"data": tokens(1)}, errors.ArgumentError, "data has 1 batches; give two"),
        ({"epochs": 0}, errors.ArgumentError, "epochs=0 is not an integer >= 1"),
        ({"lr": float("inf")}, errors.ArgumentError, "lr=inf is outside (0, inf)"),
        ({"kl": "yes"}, errors.ArgumentError, "kl='yes' is not True, False or None"),
        ({"data": [torch.randn(3)] * 2}, errors.ModelError, "batch 2 of distill()"),
    ],
)
def test_refusals(pair, change, error, text):
    model, small = pair
    with pytest.raises(error, match=re.escape(text)):
        alds.distill(small, model, **{"data": tokens(), **change})


def test_models_that_do_not_fit(pair):
    model, small = pair
    with pytest.raises(errors.ModelError, match="no low-rank layers: there is nothing that distill could train"):
        alds.distill(model, model, tokens())
    with pytest.raises(errors.ModelError, match="is not the dense one"):
        alds.distill(small, small, tokens())

    class Detached(Language):
        @torch.no_grad()
        def forward(self, ids):
            return super().forward(ids)

    model = Detached().eval()
    with pytest.raises(errors.ModelError, match="the compressed model's output has no gradient"):
        alds.distill(alds.compress(model, params=0.7), model, tokens())
    model = Language().eval()
    small = alds.compress(model, params=0.7)
    model.a.weight.data[0, 0] = float("nan")
    with pytest.raises(errors.ModelError, match="returns NaN or infinite values on batch"):
        alds.distill(small, model, tokens())
