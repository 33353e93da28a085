"""Layers that make their weight in every call, or are of a user's own type, are opened to layers of torch."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import alds_fast as alds
from alds_fast.layers import LowRankLayer, count_params, opened
from alds_fast.layers.opening import openers


class StdConv2d(nn.Conv2d):
    """As timm has it."""

    def __init__(self, *args, eps=1e-6, same_pad=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.eps, self.same_pad = eps, same_pad

    def standardised(self):
        filters = self.weight.flatten(1)
        mean, variance = filters.mean(1, keepdim=True), filters.var(1, unbiased=False, keepdim=True)
        return ((filters - mean) / (variance + self.eps).sqrt()).view_as(self.weight)

    def forward(self, x):
        x = padded(x, self) if self.same_pad else x
        return F.conv2d(x, self.standardised(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class ScaledStdConv2d(StdConv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = self.weight[0].numel() ** -0.5
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def standardised(self):
        return super().standardised() * self.gain * self.scale


class Conv2dSame(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(padded(x, self), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def padded(x, conv):
    height, width = (
        max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        for n, k, s, d in zip(x.shape[-2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
    )
    return F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])


class FalconLinear(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


for kind in (StdConv2d, ScaledStdConv2d, Conv2dSame):
    kind.__module__ = "timm.layers"
FalconLinear.__module__ = "transformers.models.falcon.modeling_falcon"


class MyLinear(nn.Module):
    """A layer of a user's own."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.matrix, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 4), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.matrix + self.bias


@pytest.fixture
def registered():
    before = list(openers.OPENERS)

    @alds.register(MyLinear)
    def as_linear(module):
        linear = nn.Linear(*module.matrix.shape, device="meta")
        linear.weight, linear.bias = nn.Parameter(module.matrix.detach().T), module.bias
        return linear

    yield as_linear
    openers.OPENERS[:] = before


MAKERS = {
    "weight norm, a hook": lambda: weight_norm(nn.Conv2d(4, 12, 3, padding=1)),
    "weight norm, a parametrization": lambda: parametrizations.weight_norm(nn.Conv2d(4, 12, 3, padding=1)),
    "of another dimension": lambda: parametrizations.weight_norm(nn.Conv2d(4, 12, 3, padding=1), dim=1),
    "standardised": lambda: StdConv2d(4, 12, 3, padding=1, bias=False),
    "standardised and scaled": lambda: ScaledStdConv2d(4, 12, 3, padding=1, groups=2),
    "same padding": lambda: Conv2dSame(4, 12, 3, stride=2),
    "standardised, same padding": lambda: StdConv2d(4, 12, (3, 4), stride=2, dilation=2, same_pad=True),
    "scaled, same padding": lambda: ScaledStdConv2d(4, 12, 3, same_pad=True),
}


def net(kind):
    torch.manual_seed(0)
    return nn.Sequential(MAKERS[kind](), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 5)).eval()


def images(count=64):
    return torch.randn(count, 4, 9, 7, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("kind", MAKERS)
def test_outputs_are_those_of_the_model(kind):
    model, x = net(kind), images(3)
    same = opened(model)
    assert same is not model and not any("weight_" in name or "gain" in name for name in same.state_dict())
    torch.testing.assert_close(same(x), model(x), rtol=1e-4, atol=1e-5)
    assert opened(same) is same


@torch.no_grad()
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.filterwarnings("ignore:.*samples kept aside:UserWarning")
def test_they_are_compressed_saved_and_loaded(kind, tmp_path):
    model, x, options = net(kind), images(3), {"data": [images()]} if "scaled" in kind else {}
    before = copy.deepcopy(model.state_dict())
    small = alds.compress(model, params=0.7, include="0*", **options)
    assert any(isinstance(m, LowRankLayer) for m in small[0].modules())
    assert count_params(small) == small.alds_plan.params <= 0.7 * count_params(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    alds.save(small, tmp_path / "small.st")
    assert torch.equal(alds.load(tmp_path / "small.st", net(kind))(x), small(x))
    whole = alds.analyze(model).plan(params=1.0).apply(model)
    assert type(whole[0]) is type(model[0]) and torch.equal(whole(x), model(x))


def test_a_linear_whose_forward_is_written_out_is_decomposed(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(FalconLinear(32, 64), nn.ReLU(), FalconLinear(64, 8)).eval(), torch.randn(3, 32)
    small = alds.compress(model, params=0.5, pins={"2": "dense"})
    assert [type(small[0]), type(small[2])] == [alds.LowRankLinear, FalconLinear]
    alds.save(small, tmp_path / "small.safetensors")
    assert torch.equal(alds.load(tmp_path / "small.safetensors", model)(x), small(x))
    torch.testing.assert_close(alds.compress(model, params=1.0)(x), model(x))


def test_a_plan_edited_by_hand_counts_what_a_norm_takes_along():
    model = net("weight norm, a parametrization")
    plan = alds.analyze(model, groups=(1,), schemes=(0,)).plan(params=0.8, pivots=False)
    data = json.loads(plan.to_json())
    for start in (data["layers"][0]["rank"], None):
        data["layers"][0] |= {"scheme": 0, "groups": 1, "rank": 2, "pivots": ""}
        if start is None:
            data["layers"][0]["error_is_of"] = [None, None, None]
        edited = alds.Plan.from_json(json.dumps(data))
        assert count_params(edited.apply(model)) == edited.params


@pytest.mark.usefixtures("registered")
def test_layers_of_a_registered_type_are_decomposed(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(MyLinear(24, 16), nn.ReLU(), MyLinear(16, 16)), torch.randn(300, 24)
    small = alds.compress(model, params=0.6, data=[x], sensitivity=True, example_inputs=x)
    assert any(isinstance(m, alds.LowRankLinear) for m in small)
    full = alds.analyze(model).plan(params=1.0).apply(model)
    assert [type(m) for m in full] == [MyLinear, nn.ReLU, MyLinear]
    alds.save(small, tmp_path / "small.st")
    assert torch.equal(alds.load(tmp_path / "small.st", model)(x), small(x))
    model[0].register_forward_hook(lambda module, args, y: y)
    assert "it has hooks" in alds.analyze(model).layers[0].reason


def test_what_cannot_be_registered_is_refused(registered):
    for kind in (nn.Linear, nn.Module, int, "MyLinear"):
        with pytest.raises(alds.AldsError, match="no type of modules of your own"):
            alds.register(kind, registered)
    with pytest.raises(alds.AldsError, match="expected a function"):
        alds.register(MyLinear, 3)
    for function, words in {
        lambda module: None: "not another module",
        lambda module: module: "not another module",
        lambda module: 1 / 0: "failed .ZeroDivisionError",
        lambda module: nn.Linear(99, 99): "9,900 parameters in the place of 20",
        lambda module: nn.ReLU(): "0 layers",
    }.items():
        alds.register(MyLinear, function)
        with pytest.raises(alds.AldsError, match=words):
            alds.analyze(nn.Sequential(MyLinear(4, 4)))


def test_what_computes_something_else_is_refused_where_there_are_inputs(registered):
    def turned(module):
        linear = registered(module)
        linear.weight = nn.Parameter(linear.weight.detach().T.contiguous())
        return linear

    model, x = nn.Sequential(MyLinear(16, 16), MyLinear(16, 16)), torch.randn(300, 16)
    for options in ({"example_inputs": x}, {"data": [x]}):
        alds.register(MyLinear, registered)
        alds.analyze(model, **options)
        alds.register(MyLinear, turned)
        with pytest.raises(alds.AldsError, match="layer '0': what its registered function gave returns something else"):
            alds.analyze(model, **options)
    alds.analyze(model)  # nothing to tell by


def test_what_stays_closed_says_why():
    hooked = weight_norm(nn.Linear(8, 8))
    hooked.register_forward_hook(lambda module, args, y: y)
    twice = parametrizations.weight_norm(nn.Linear(8, 8))
    parametrizations.spectral_norm(twice)
    own = type("Own", (nn.Linear,), {"forward": lambda self, x: x})
    layers = alds.analyze(nn.Sequential(hooked, twice, weight_norm(own(8, 8)), nn.Linear(8, 8))).layers
    reasons = [layer.reason for layer in layers]
    assert reasons[0] == "it has hooks beside its weight norm; remove them first"
    assert "parametrized" in reasons[1] and "forward of its own" in reasons[2] and reasons[3] is None
