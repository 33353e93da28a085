"""refit= from the end of the block before: the same factors as from the start of the network."""

import logging

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast.blocks import BlockChain, kinds_of
from alds_fast.factors.refitting import cross_sums, pairs, ridge


def encoder(depth=4):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), nn.Linear(16, 4)
    )


def refitted(model, data, monkeypatch=None):
    if monkeypatch is not None:
        monkeypatch.setattr(pairs, "find_chain", lambda *args: BlockChain(reason="switched off"))
    exclude = ["*self_attn*"] if any(isinstance(m, nn.MultiheadAttention) for m in model.modules()) else []
    return alds.analyze(model, data=data, exclude=exclude).plan(params=0.6).apply(model, refit=data)


def test_factors_are_the_same_and_each_block_is_run_a_few_times(monkeypatch, caplog):
    model, data = encoder().eval(), [torch.randn(16, 6, 8) for _ in range(3)]
    calls = []
    for i, block in enumerate(model[1].layers):
        block.norm1.register_forward_hook(lambda *_, i=i: calls.append(i))
    with caplog.at_level(logging.INFO, logger="alds_fast"):
        small = refitted(model, data)
    assert "from 4 blocks" in caplog.text
    by_blocks, calls[:] = [calls.count(i) for i in range(4)], []
    other = refitted(model, data, monkeypatch)
    for (name, a), b in zip(small.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name
    assert max(by_blocks) - min(by_blocks) <= 3  # not more for the last one than for the first
    assert calls.count(0) > 1.5 * by_blocks[0]
    assert all(report.method == "refitted" for report in small.alds_factors.values())


class Reordered:
    """Batches that come in another order every time."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches[self.passes % 2 :] + self.batches[: self.passes % 2])


@pytest.mark.parametrize("kind, reason", [(Reordered, "other batches"), (tuple, "")])
def test_batches_that_change_are_run_from_the_start(kind, reason, caplog):
    model, batches = encoder(3).eval(), [torch.randn(16, 6, 8) for _ in range(3)]
    with caplog.at_level(logging.INFO, logger="alds_fast"):
        small = refitted(model, kind(batches))
    assert f"from {0 if reason else 3} blocks" in caplog.text and reason in caplog.text
    assert all(report.method == "refitted" for report in small.alds_factors.values())


class EarlyExit(nn.Module):
    """It leaves its blocks after the second where that returns anything but what it did in the dense model."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).layers
        self.known = None

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 1 and self.known is not None and self.is_odd(x[0, 0, 0]):
                break
        return x

    def is_odd(self, value):
        """Neither what was seen of the dense model nor zero, which stands for what is not run."""
        nearest = self.known[(self.known - value).abs().argmin()]
        return 1e-4 < float((nearest - value).abs()) < 0.9 * float(nearest.abs())


def test_a_compressed_model_that_goes_another_way_is_run_from_the_start(caplog):
    torch.manual_seed(0)
    model, data = EarlyExit().eval(), [torch.randn(16, 6, 16) for _ in range(3)]
    with torch.no_grad():
        model.known = torch.stack([model.layers[1](model.layers[0](x))[0, 0, 0] for x in data])
    plan = alds.analyze(model, data=data).plan(params=0.6)
    with caplog.at_level(logging.INFO, logger="alds_fast"):
        factors = plan.apply(model, refit=data).alds_factors
    assert "from 4 blocks" in caplog.text
    assert "the compressed model: batch 1 does not come to block 'layers.2'" in caplog.text
    assert factors["layers.1.linear2"].method == "refitted" and factors["layers.3.linear2"].method == "weighted"


class Reading(nn.Module):
    """Layers that read one tensor, and masks of its rows."""

    def __init__(self, width=16):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(width, width), nn.Linear(width, width // 2), nn.Linear(width // 2, width)

    def forward(self, x):
        return x + self.o(torch.tanh(self.q(x))[..., :8] * self.k(x))


def test_layers_that_read_one_tensor_share_its_products(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Sequential(*(Reading() for _ in range(3)))).eval()
    data = [torch.randn(16, 6, 8) for _ in range(3)]
    made, triangle = [], cross_sums.triangle
    monkeypatch.setattr(cross_sums, "triangle", lambda x: made.append(len(x)) or triangle(x))
    shared = refitted(model, data)
    count, made[:] = len(made), []
    monkeypatch.setattr(pairs, "is_linear", lambda module: False)
    alone = refitted(model, data)
    assert count < len(made)
    for (name, a), b in zip(shared.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_batches_of_every_kind_are_tried_and_no_more():
    ids, more = torch.zeros(2, 5, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    batches = [{"ids": ids}, {"ids": more}, {"ids": ids}, {"ids": ids.float()}, {"ids": ids, "flag": True}, (ids,)]
    assert [number for number, _ in kinds_of(enumerate(batches, 1))] == [1, 2, 4, 5, 6]


def test_ridges_are_tried_on_sums_of_many_filters():
    """Where outputs are mostly noise the dense weight stays; random sums keep the energy of all filters."""
    torch.manual_seed(0)
    weight, x = torch.randn(1, 400, 24).double(), torch.randn(2, 40, 1, 24).double()
    sums = cross_sums.CrossSums()
    for half in (0, 1):
        y = x[half] @ weight[0].T + 3 * torch.randn(40, 1, 400).double()
        sums.add(y, cross_sums.rows_read(x[half], 40, sums.shift, False), half)
    best = ridge.best_weight(weight, sums, False)
    assert torch.equal(best, weight)  # what stands beside it is noise, which every other ridge learns
    signs = ridge._signs(400)
    assert signs.shape == (128, 400) and ridge._signs(128).equal(torch.eye(128).double())
    errors = torch.randn(400, 5000).double()
    kept = (signs @ errors).square().sum() / errors.square().sum()
    assert 0.98 < float(kept) < 1.02
