"""FLOPs of layers and their replacements: equal to what torch counts, to the last one."""

import numpy as np
import pytest
import torch
from support.models import images, small_net
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import alds_fast as alds
from alds_fast.allocation import candidates
from alds_fast.factors import Choice, factorize
from alds_fast.layers import find_layers
from alds_fast.linalg import Decomposition, distinct_schemes, divisors
from alds_fast.measurement import call_model, count_inputs, dense_flops, flops_of_ranks


def counted(model, inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call_model(model.eval(), inputs)
    return counter.get_total_flops()


class Reused(nn.Module):
    """A layer called twice on two shapes, one never called, and a product that belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.twice, self.never = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        y = self.twice(self.twice(x).mean(1)) + self.twice(x[0, 0])
        return y @ y.T


NETS = {
    "small": (small_net, images()),
    "reused": (Reused, torch.randn(3, 5, 12)),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(8, 12, 5, stride=2, padding=3, dilation=2), nn.Conv1d(12, 8, 4, groups=4)),
        torch.randn(2, 8, 40),
    ),
    "same padding": (lambda: nn.Conv2d(8, 6, (4, 3), padding="same", dilation=(1, 2)), torch.randn(2, 8, 9, 11)),
    "valid padding": (lambda: nn.Conv2d(8, 6, 3, padding="valid", stride=(2, 1)), torch.randn(2, 8, 9, 11)),
    "circular": (
        lambda: nn.Conv2d(8, 6, 3, padding=(1, 2), stride=(1, 2), padding_mode="circular"),
        torch.randn(2, 8, 9, 11),
    ),
    "depthwise, grouped": (
        lambda: nn.Sequential(nn.Conv2d(8, 16, (5, 3), groups=8, padding=2), nn.Conv2d(16, 12, 3, groups=2, stride=2)),
        torch.randn(2, 8, 12, 12),
    ),
    "three dimensions": (
        lambda: nn.Conv3d(6, 8, (3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 2)),
        torch.randn(1, 6, 6, 7, 8),
    ),
    "without a batch": (lambda: nn.Conv2d(6, 8, 3, stride=2), torch.randn(6, 9, 9)),
}


@pytest.mark.parametrize("name", list(NETS))
def test_flops_equal_torchs_for_every_scheme_and_groups(name):
    build, x = NETS[name]
    model = build()
    layers = [layer for layer in find_layers(model) if layer.reason is None]
    inputs, total = count_inputs(model, x, [layer.name for layer in layers])
    assert total == counted(model, x)
    for layer in layers:
        calls, shape = inputs[layer.name], layer.shape
        dense = dense_flops(layer.module, shape, calls)
        for scheme in distinct_schemes((0, 1, 2, 3), shape.kernel):
            for groups in divisors(shape.slice_channels):
                for curve in candidates(shape, {(scheme, groups): torch.ones(shape.numel)}, 1, 0.0).curves:
                    form, ranks = curve.decomposition(1), curve.ranks[[0, -1]]
                    costs = flops_of_ranks(layer.module, shape, calls, form, ranks)
                    for rank, cost in zip(ranks.tolist(), costs.tolist(), strict=True):
                        small, _ = factorize(model, [Choice(layer.name, shape, form._replace(rank=rank))])
                        assert counted(small, x) == total - dense + cost, (layer.name, form, rank)


def test_a_layer_that_is_never_called_costs_nothing():
    model = Reused()
    inputs, _ = count_inputs(model, torch.randn(3, 5, 12), ["never"])
    shape = alds.analyze(model).spectra["never"].layer.shape
    assert dense_flops(model.never, shape, inputs["never"]) == 0
    ranks = np.array([3])
    assert flops_of_ranks(model.never, shape, inputs["never"], Decomposition(0, 2, 1), ranks).tolist() == [0]


def test_torchs_transformer_layers_are_counted(monkeypatch):
    """Dense, they take a fused path in which torch's counter sees nothing; compressed, they do not."""
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(3, 6, 32)
    analysis = alds.analyze(model)
    _, total = count_inputs(analysis.model, x, list(analysis.spectra))
    small = analysis.plan(flops=0.8, example_inputs=x).apply(model)
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)  # there torch counts nothing either
    attention = 2 * 2 * 3 * 2 * 6 * 6 * (16 + 16)  # which torch does not count on the CPU
    assert counted(model, x) + attention == total
    assert 0.75 * total < counted(small, x) + attention == count_inputs(small, x, ())[1] <= 0.8 * total


class Sequences(nn.Module):
    """A recurrent layer, and attention of its outputs, for which torch counts nothing on the CPU."""

    def __init__(self):
        super().__init__()
        self.steps = nn.LSTM(8, 16, 2, batch_first=True, bidirectional=True)
        self.last = nn.Linear(32, 4)

    def forward(self, x):
        y = self.steps(x)[0].unflatten(-1, (4, 8)).transpose(1, 2)
        return self.last(nn.functional.scaled_dot_product_attention(y, y[:, :, :3], y[:, :, :3]).flatten(2)[..., :32])


def test_recurrent_layers_and_attention_are_counted():
    x = torch.randn(2, 5, 8)
    steps = 2 * 2 * 5 * 2 * (64 * (8 + 16) + 64 * (32 + 16))
    attention = 2 * 2 * 4 * 5 * 3 * (8 + 8)
    rows = 2 * 4
    assert count_inputs(Sequences(), x, ())[1] == steps + attention + 2 * rows * 32 * 4
    plan = alds.analyze(Sequences(), progress=False).plan(flops=0.995, example_inputs=x, progress=False)
    assert plan.costs["flops"][0] == steps + attention + 2 * rows * 32 * 4
