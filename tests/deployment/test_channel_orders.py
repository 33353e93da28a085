"""Channels between layers in the order in which layers with output pivots make them: where, and the same outputs."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import alds_fast as alds
from alds_fast.deployment.channel_flow import channel_groups
from alds_fast.deployment.channel_orders import _alike, with_channels_in_order
from alds_fast.errors import ArgumentError
from alds_fast.layers import LowRankLayer

ONE = {"groups": (1,), "schemes": (0,)}


class Gated(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.norm, self.down = nn.LayerNorm(width), nn.Linear(64, width)
        self.gate, self.up = nn.Linear(width, 64, bias=False), nn.Linear(width, 64)

    def forward(self, x):
        z = self.norm(x)
        return x + self.down(F.silu(self.gate(z)) * self.up(z))


class Block(nn.Module):
    def __init__(self, channels, filters):
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, filters, 3, padding=1), nn.Conv2d(filters, filters, 3, padding=1)
        self.na, self.nb, self.short = nn.BatchNorm2d(filters), nn.BatchNorm2d(filters), nn.Conv2d(channels, filters, 1)
        self.s1, self.s2 = nn.Linear(filters, 16), nn.Linear(16, filters)

    def forward(self, x):
        y = self.nb(self.b(torch.relu(self.na(self.a(x)))))
        scale = self.s2(torch.relu(self.s1(y.mean((2, 3))))).sigmoid()
        return torch.relu(y * scale[:, :, None, None] + self.short(x))


def images(net):
    return nn.Sequential(net, nn.MaxPool2d(2), Block(24, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def mlp():
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))


def volumes():
    return nn.Sequential(nn.Conv3d(8, 24, 3), nn.BatchNorm3d(24), nn.ReLU(), nn.Conv3d(24, 32, 3))


NETS = {  # and an input, and the layers that are in order then
    "mlp": (mlp, (7, 32), ["0", "2"]),
    "gated": (lambda: nn.Sequential(Gated(), Gated()), (2, 5, 32), ["0.gate", "1.gate"]),
    "images": (lambda: images(Block(8, 24)), (2, 8, 8, 8), ["0.a", "0.s1", "2.a", "2.s1"]),
    "volumes": (volumes, (2, 8, 6, 6, 6), ["0"]),
}


def compressed(build, **options):
    torch.manual_seed(0)
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            for value in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(value)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return alds.compress(model, **({"params": 0.7, **ONE} | options))


def in_order(model):
    return [name for name, m in model.named_modules() if isinstance(m, LowRankLayer) and m.in_order]


@pytest.mark.parametrize("kind", NETS)
def test_the_model_computes_the_same(kind):
    build, shape, expected = NETS[kind]
    small, x = compressed(build), torch.randn(shape)
    state = copy.deepcopy(small.state_dict())
    new = with_channels_in_order(small, x)
    assert [name.replace("up", "gate") for name in in_order(new)] == expected and not in_order(small)
    for data in (x, torch.randn(shape)):
        torch.testing.assert_close(new(data), small(data), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(new(data), small(data), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())
    assert with_channels_in_order(new, x) is new  # nothing is left to be done


def test_dense_and_plain_layers_follow():
    for options in ({"include": ["0"]}, {"include": ["0", "2"]}, {"include": ["0"], "exclude": ["2"]}):
        small = compressed(NETS["mlp"][0], params=0.9, **options)
        new, x = with_channels_in_order(small, torch.randn(7, 32)), torch.randn(9, 32)
        assert "0" in in_order(new)
        torch.testing.assert_close(new(x), small(x), rtol=1e-4, atol=1e-5)
    small = compressed(NETS["gated"][0], params=0.95, include=["*.gate"])
    new, x = with_channels_in_order(small, torch.randn(2, 5, 32)), torch.randn(3, 4, 32)
    assert in_order(new) == ["0.gate", "1.gate"] and type(new[0].up) is nn.Linear
    torch.testing.assert_close(new(x), small(x), rtol=1e-4, atol=1e-5)


def test_input_pivots_take_their_table_along():
    small = compressed(volumes, include=["0"], params=0.9)
    torch.manual_seed(1)
    small[3] = alds.LowRankConv3d.from_dense(nn.Conv3d(24, 32, 3), rank=12, scheme=3, pivots="input")
    new, x = with_channels_in_order(small, torch.randn(2, 8, 6, 6, 6)), torch.randn(2, 8, 6, 6, 6)
    assert in_order(new) == ["0"]
    torch.testing.assert_close(new(x), small(x), rtol=1e-4, atol=1e-5)
    y = torch.randn(2, 24, 4, 4, 4)
    torch.testing.assert_close(new[3].to_dense()(y), new[3](y), rtol=1e-4, atol=1e-5)


class Pair(nn.Module):
    def __init__(self, between, first=None, second=None):
        super().__init__()
        self.a, self.b, self.between = first or nn.Linear(32, 64), second or nn.Linear(64, 32), between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


class Returns(Pair):
    def forward(self, x):
        y = self.a(x)
        return self.b(y), y


class Twice(Pair):
    def forward(self, x):
        return self.b(torch.relu(self.a(x))) + self.b(torch.cat([x, x], -1))


BOUND = {
    "softmax": lambda: Pair(nn.Softmax(-1)),
    "norm": lambda: Pair(nn.LayerNorm(64)),
    "heads": lambda: Pair(lambda y: y.view(*y.shape[:-1], 4, 16).transpose(-2, -3).flatten(-2).reshape(y.shape)),
    "rolled": lambda: Pair(lambda y: y.roll(1, -1)),
    "scaled": lambda: Pair(lambda y: y * torch.linspace(0, 1, 64)),
    "a part": lambda: Pair(lambda y: torch.cat([y[..., :32], y[..., 32:]], -1)),
    "returned": lambda: Returns(None),
    "taken twice": lambda: Twice(None),
    "grouped": lambda: Pair(nn.ReLU(), nn.Conv1d(32, 64, 1), nn.Conv1d(64, 32, 1, groups=2)),
}


@pytest.mark.parametrize("kind", BOUND)
def test_channels_that_something_sees_stay(kind):
    small = compressed(BOUND[kind], include=["a"], params=0.9)
    assert small.a.pivots == "output"
    x = torch.randn(3, 32, 5) if kind == "grouped" else torch.randn(3, 5, 32)
    assert with_channels_in_order(small, x) is small


def test_slices_and_shared_weights_stay():
    small, x = compressed(NETS["mlp"][0]), torch.randn(7, 32)
    sliced = copy.deepcopy(small)
    sliced[2] = alds.LowRankLinear.from_dense(nn.Linear(64, 64), rank=5, groups=2)
    assert in_order(with_channels_in_order(sliced, x)) == []
    shared = copy.deepcopy(small)
    shared.append(nn.Linear(32, 32))
    shared[5].bias = shared[4].bias
    assert in_order(with_channels_in_order(shared, x)) == ["0"]


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.other = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(64, 32)

    def forward(self, x, other=False):
        return (self.other if other else self.b)(torch.relu(self.a(x)))


@dataclass
class Result:
    logits: torch.Tensor
    hidden: torch.Tensor


class InADataclass(Pair):
    def forward(self, x):
        y = torch.relu(self.a(x))
        return Result(self.b(y), y)


class Keeps(Pair):
    def forward(self, x):
        self.last = torch.relu(self.a(x))
        return self.b(self.last)


def test_layers_that_the_example_does_not_call_are_said():
    small = compressed(Heads, include=["a"], params=0.9)
    with pytest.warns(UserWarning, match="channels stay in the order of the outputs: 'other' is not called"):
        assert with_channels_in_order(small, torch.randn(3, 32)) is small


def test_hooks_anywhere_are_said():
    small, x = compressed(NETS["mlp"][0]), torch.randn(7, 32)
    for module in (small, small[1]):
        handle = module.register_forward_hook(lambda module, args, y: None)
        with pytest.warns(UserWarning, match="has hooks, which may read them"):
            assert with_channels_in_order(small, x) is small
        handle.remove()


@pytest.mark.parametrize("kind", [lambda: InADataclass(None), lambda: Keeps(None)])
def test_values_in_objects_and_on_modules_stay(kind):
    small = compressed(kind, include=["a"], params=0.9)
    assert with_channels_in_order(small, torch.randn(3, 32)) is small


def test_whole_numbers_are_compared_and_nothing_is_not_alike():
    x, y = torch.tensor([1, 2]), torch.tensor([1, 3])
    assert _alike([x], [x.clone()]) and not _alike([x], [y]) and not _alike([], [])
    assert not _alike([torch.ones(3)], [torch.full((3,), 1.001)]) and _alike(
        [torch.ones(3)], [torch.full((3,), 1.000001)]
    )
    assert not _alike([torch.ones(3, dtype=torch.bfloat16)], [torch.full((3,), 1.1, dtype=torch.bfloat16)])


def test_pools_that_take_channels_for_a_dimension_bind_them():
    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 8, 1)

        def forward(self, x):
            return self.b(F.max_pool3d(self.a(x), 3, 1, 1))  # read as one sample with 4 "channels"

    small = compressed(Pools, include=["a"], params=0.9)
    assert with_channels_in_order(small, torch.randn(4, 8, 6, 6)) is small


def test_reorder_is_checked():
    small = compressed(NETS["mlp"][0])
    for options in ({"reorder": 1}, {"reorder": True, "backend": "two-op"}):
        with pytest.raises(ArgumentError, match="reorder=.* is True or False, and goes with backend=None"):
            alds.deploy(small, torch.randn(7, 32), **options)


def test_forward_mode_differentiation_without_gradients():
    from torch.autograd import forward_ad

    layer, x = alds.LowRankLinear(24, 40, 5, pivots="output"), torch.randn(70, 24)
    with torch.no_grad(), forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, x))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, layer(x) - layer.bias)


def test_values_that_are_written_through_numpy_stay():
    def through_numpy(y):
        values = torch.from_numpy(y.detach().numpy())  # another tensor of the same memory
        values *= torch.linspace(0, 1, 64)
        return y

    small = compressed(lambda: Pair(through_numpy), include=["a"], params=0.9)
    x = torch.randn(3, 32)
    assert with_channels_in_order(small, x) is small


def test_other_outputs_are_said(monkeypatch):
    monkeypatch.setattr("alds_fast.deployment.channel_orders._take_in", lambda module, order: None)
    small, x = compressed(NETS["mlp"][0]), torch.randn(7, 32)
    with pytest.warns(
        UserWarning, match="the model gave other outputs, so that something unseen depends on their order"
    ):
        assert with_channels_in_order(small, x) is small


def test_deploy_says_what_is_in_order_and_saved_models_load(tmp_path):
    small, x = compressed(NETS["mlp"][0]), torch.randn(128, 32)
    _, table = alds.deploy(small, x, rounds=1, report=True)
    assert not any("in order" in row.structure for row in table.rows)
    fast, table = alds.deploy(small, x, rounds=1, report=True, reorder=True)
    assert [row.structure.endswith(", in order") for row in table.rows] == [True, True, False]
    torch.testing.assert_close(fast(x), small(x), rtol=1e-4, atol=1e-5)
    new = with_channels_in_order(small, x)
    assert "pivots='output', in_order=True" in repr(new[0])
    alds.save(new, tmp_path / "x.safetensors")
    loaded = alds.load(tmp_path / "x.safetensors", NETS["mlp"][0]())
    torch.testing.assert_close(loaded(x), small(x), rtol=1e-4, atol=1e-5)
    other = compressed(NETS["mlp"][0])
    new.load_state_dict(other.state_dict())  # other tables: nothing is in order any more
    assert in_order(new) == []
    torch.testing.assert_close(new(x), other(x))


@contextmanager
def poisoned():
    """Memory that is not set holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [3, 100])
def test_calls_without_gradients_are_those_with(rows, dtype):
    torch.manual_seed(0)
    for bias in (True, False):
        layer = alds.LowRankLinear.from_dense(nn.Linear(40, 56, bias=bias), rank=17, pivots="output").to(dtype)
        x = torch.randn(rows, 40, dtype=dtype)
        expected = layer(x)
        with torch.no_grad(), poisoned():
            for y in (layer(x), layer(x.view(1, rows, 40))[0]):
                assert (y - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("rows", [3, 100])
def test_autocast_gives_its_own_type(rows):
    for layer, x in (
        (alds.LowRankLinear(40, 56, 17, pivots="output"), torch.randn(rows, 40)),
        (alds.LowRankConv2d(8, 16, 3, 5, pivots="output"), torch.randn(2, 8, 6, 6)),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == layer.to_dense()(x).dtype == torch.bfloat16
            with torch.no_grad():
                assert layer(x).dtype == torch.bfloat16


def test_groups_are_named():
    small = compressed(NETS["gated"][0])
    first, second = channel_groups(small, torch.randn(2, 5, 32))
    assert first.makers == {"0.gate", "0.up"} and first.takers == {"0.down"} and second.makers == {"1.gate", "1.up"}
