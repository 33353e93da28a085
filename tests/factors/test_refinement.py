"""refine(): blocks trained to the dense model's, never worse on what is kept aside."""

import copy
import re

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast import errors


def encoder(depth=3):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.1)
    return nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)).eval()


def batches(count=9):
    torch.manual_seed(1)
    return [torch.randn(8, 6, 8) for _ in range(count)]


@pytest.fixture(scope="module")
def pair():
    model = encoder()
    return model, alds.compress(model, params=0.6, include="1.layers.*")


def apart(model, small, data):
    with torch.no_grad():
        return sum(float((model(x) - small(x)).norm() / model(x).norm()) for x in data) / len(data)


def test_blocks_get_nearer_and_nothing_else_changes(pair):
    model, small = pair
    before, dense = copy.deepcopy(small.state_dict()), copy.deepcopy(model.state_dict())
    told = []
    better, reports = alds.refine(small, model, batches(), lr=5e-2, progress=lambda *args: told.append(args))
    assert [report.block for report in reports] == [f"1.layers.{i}" for i in range(3)]
    assert all(0 < report.after < 0.95 * report.before for report in reports)
    torch.manual_seed(2)
    fresh = [torch.randn(8, 6, 8) for _ in range(4)]
    assert apart(model, better, fresh) < 0.9 * apart(model, small, fresh)
    assert told == [("blocks refined", i, 3) for i in (1, 2, 3)]
    for net, state in ((small, before), (model, dense)):
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(better[0].weight, model[0].weight)
    assert all(p.requires_grad and p.grad is None for p in better.parameters())
    assert not torch.equal(better[1].layers[0].norm1.weight, small[1].layers[0].norm1.weight)
    assert better.alds_plan == small.alds_plan and not better.training


class Residual(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def test_one_loud_token_does_not_drown_the_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Sequential(*(Residual() for _ in range(3)))).eval()
    small = alds.compress(model, params=0.5, include="1.*")
    loud = [torch.cat([1e3 * x[:, :1], x[:, 1:]], 1) for x in batches()]
    better, _ = alds.refine(small, model, loud, lr=5e-2)
    with torch.no_grad():
        before, after = (float((model(loud[-1]) - net(loud[-1]))[:, 1:].norm()) for net in (small, better))
    assert after < 0.8 * before, (before, after)


def test_it_is_repeatable(pair):
    model, small = pair
    first, second = (alds.refine(small, model, batches(4), epochs=1)[0].state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_block_that_gets_worse_is_as_it_was(pair):
    model, small = pair
    same, reports = alds.refine(small, model, batches(4), lr=1e3, epochs=2)
    assert all(report.after == report.before for report in reports)
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in same.state_dict().items())


def test_padding_does_not_count():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = encoder()

        def forward(self, x, attention_mask):
            return self.net[1](self.net[0](x), src_key_padding_mask=attention_mask == 0)

    model = Padded().eval()
    small = alds.compress(model, params=0.6, include="net.1.layers.*", data=None)
    mask = torch.ones(8, 6, dtype=torch.long)
    mask[:, 4:] = 0
    data = [{"x": x, "attention_mask": mask} for x in batches(4)]
    garbage = [{"x": b["x"] + 100 * (1 - mask).unsqueeze(-1), "attention_mask": mask} for b in data]
    a, b = (alds.refine(small, model, d, epochs=1)[1] for d in (data, garbage))
    assert all(x.before == pytest.approx(y.before, rel=1e-4) for x, y in zip(a, b, strict=True))
    c = alds.refine(small, model, garbage, epochs=1, mask=None)[1]
    assert c[0].before != pytest.approx(a[0].before, rel=1e-3)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"data": batches(1)}, errors.ArgumentError, "data has 1 batches; give two"),
        ({"data": torch.zeros(2)}, errors.ArgumentError, "data is a Tensor"),
        ({"epochs": 0}, errors.ArgumentError, "epochs=0 is not an integer >= 1"),
        ({"lr": -1.0}, errors.ArgumentError, r"lr=-1.0 is outside (0, inf)"),
        ({"data": [torch.randn(8, 6, 9)] * 2}, errors.ModelError, "batch 1 of refine()"),
    ],
)
def test_refusals(pair, change, error, text):
    model, small = pair
    with pytest.raises(error, match=re.escape(text)):
        alds.refine(small, model, **{"data": batches(2), **change})


def test_models_that_do_not_fit(pair):
    model, small = pair
    with pytest.raises(errors.ModelError, match="no low-rank layers"):
        alds.refine(model, model, batches(2))
    with pytest.raises(errors.ModelError, match="is not the dense one"):
        alds.refine(small, small, batches(2))
    with pytest.raises(errors.ArgumentError, match=r"torch.bfloat16, in which small steps .* \.float\(\)"):
        alds.refine(copy.deepcopy(small).bfloat16(), model, batches(2))
    flat = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    with pytest.raises(errors.ModelError, match="needs a chain of blocks: the model has 0 modules"):
        alds.refine(alds.compress(flat, params=0.6), flat, batches(2))


def test_masks_that_fit_no_output_are_warned_of_and_tokens_may_come_first():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
            self.net = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

        def forward(self, x, src_key_padding_mask=None):
            return self.net(x, src_key_padding_mask=src_key_padding_mask)

    model = First().eval()
    small = alds.compress(model, params=0.6)
    mask = torch.zeros(8, 6, dtype=torch.bool)
    mask[:, 4:] = True
    torch.manual_seed(1)
    data = [{"x": torch.randn(6, 8, 16), "src_key_padding_mask": mask} for _ in range(3)]
    garbage = [{**b, "x": b["x"] + 100 * mask.T.unsqueeze(-1)} for b in data]
    a, b = (alds.refine(small, model, d, epochs=1)[1] for d in (data, garbage))
    assert all(x.before == pytest.approx(y.before, rel=1e-4) for x, y in zip(a, b, strict=True))


def test_layers_that_blocks_share_are_left(pair):
    class Block(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), shared

        def forward(self, x):
            return x + self.down(self.up(x).relu())

    torch.manual_seed(0)
    shared = nn.Linear(32, 16)
    model = nn.Sequential(*(Block(shared) for _ in range(4))).eval()
    small = alds.compress(model, params=0.6)
    data = [torch.randn(64, 16) for _ in range(6)]
    better, _ = alds.refine(small, model, data, lr=5e-2)
    with torch.no_grad():
        before, after = (float((net(data[-1]) - model(data[-1])).norm()) for net in (small, better))
    assert after < before
    for name, value in small[0].down.state_dict().items():
        assert torch.equal(value, better[0].down.state_dict()[name])


def test_nan_is_refused_and_all_streams_count(pair):
    model, small = pair
    for place in (0, -1):
        data = batches(4)
        data[place] = torch.full_like(data[place], float("nan"))
        with pytest.raises(errors.ModelError, match="returns NaN or infinite values on batch"):
            alds.refine(small, model, data)
    with pytest.raises(errors.ModelError, match="batch 2 of refine"):
        alds.refine(small, model, [*batches(1), torch.randn(8, 6, 9), *batches(1)])

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x, y):
            return x + self.a(y).tanh(), y + self.b(x).tanh()

    class Streams(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Two() for _ in range(3))

        def forward(self, x):
            y = x.flip(-1)
            for block in self.blocks:
                x, y = block(x, y)
            return y

    model = Streams().eval()
    small = alds.compress(model, params=0.5)
    better, _ = alds.refine(small, model, [torch.randn(64, 24) for _ in range(9)], lr=1.5e-2, epochs=10)
    assert not torch.equal(better.blocks[0].b.encoder, small.blocks[0].b.encoder)
