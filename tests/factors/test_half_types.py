"""float16: values between the factors stay in range where outputs do, and small weights do not vanish."""

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast.errors import ModelError


def layer(scale, filters=48, columns=64, dtype=torch.float16):
    """A weight of falling singular values."""
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(filters, filters))[0], torch.linalg.qr(torch.randn(columns, filters))[0]
    net = nn.Sequential(nn.Linear(columns, filters))
    net[0].weight.data = scale * (u / torch.arange(1, filters + 1)) @ v.T
    return net.to(dtype)


def hidden(small, x):
    """The values between encoder and decoder of the first layer, in the layer's own type."""
    rows = x.view(len(x), small[0].slices, -1)
    parts = small[0].encoder.view(small[0].slices, small[0].rank, -1)
    return torch.einsum("nsc,src->nsr", rows, parts)


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize(("scale", "size"), [(1e-3, 6e4), (1e-2, 5e4), (1.0, 2e4), (300.0, 50.0), (2e3, 1.0)])
def test_outputs_near_the_range_of_the_type(scale, size, data):
    net = layer(scale)
    x = torch.randn(256, 64)
    x = (size * x / x.abs().max()).half()
    wide = net[0](x)
    assert wide.isfinite().all() and wide.abs().max() > 10
    options = {"data": [x], "refit": True} if data else {}
    small = alds.compress(net, params=0.5, **options)
    assert small[0].encoder.dtype == torch.float16 and small(x).isfinite().all()
    assert hidden(small, x).isfinite().all()
    lost = (small(x).double() - wide.double()).norm() / wide.double().norm()
    exact = alds.compress(
        layer(scale, dtype=torch.float64), params=0.5, **{**options, **({"data": [x.double()]} if data else {})}
    )
    assert float(lost) < 1.1 * float((exact(x.double()) - wide.double()).norm() / wide.double().norm()) + 5e-3


@pytest.mark.parametrize("data", [False, True])
def test_inputs_that_the_first_direction_adds_up(data):
    """x along the first right singular vector: balanced factors would have 8e4 between them, outputs are below 1e4."""
    net = layer(0.05)
    x = (6e4 * torch.linalg.svd(net[0].weight.double())[2][0].sign()).half().repeat(64, 1)
    x[1:] = x[1:] * torch.rand(63, 64).half()
    assert net[0](x).abs().max() < 1e4
    small = alds.compress(net, params=0.5, **({"data": [x], "refit": True} if data else {"groups": (1,)}))
    assert small(x).isfinite().all() and hidden(small, x).isfinite().all()


@pytest.mark.parametrize("scale", [1e-4, 1e-5])
def test_small_weights_do_not_vanish(scale):
    net = layer(scale)
    dense = net[0].weight.double()
    small = alds.compress(net, params=0.5)
    best = alds.compress(layer(scale, dtype=torch.float64), params=0.5)
    lost = [(dense - part[0].dense_weight().double()).norm() / dense.norm() for part in (small, best)]
    assert float(lost[0]) < float(lost[1]) + 0.05


def test_bfloat16_and_float32_are_balanced():
    for dtype in (torch.bfloat16, torch.float32):
        small = alds.compress(layer(1.0, dtype=dtype), params=0.5, pivots=False)[0]
        norms = small.encoder.float().norm(dim=1), small.decoder.float().norm(dim=0)
        torch.testing.assert_close(norms[0], norms[1], rtol=0.02, atol=0)


def test_outputs_that_are_small_because_parts_of_the_input_cancel():
    net = layer(1.0)
    net[0].weight.data = (3e4 / 48**0.5 * torch.outer(torch.ones(48) / 48**0.5, torch.ones(64))).half()
    x = torch.full((4, 64), 1.0).half()
    x[:, 1::2] = -1.0
    assert net[0](x).isfinite().all() and alds.compress(net, params=0.5, example_inputs=x)(x).isfinite().all()


def test_what_float16_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr("alds_fast.linalg.folding._without_overflow", lambda left, right: (left * 1e-8, right * 1e8))
    with pytest.raises(ModelError, match="layer '0': its encoder has values outside the range of torch.float16"):
        alds.compress(layer(1.0), params=0.5, pivots=False)
