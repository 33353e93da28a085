"""What code reads and sets on a dense layer, read and set on the low-rank layer in its place."""

import copy
import pickle

import pytest
import torch
from support.models import CONV
from torch import nn

import alds_fast as alds
from alds_fast.layers import LOW_RANK, LowRankLayer, MergedLinears, MergedPart

CONV_ATTRIBUTES = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    *("transposed", "output_padding", "padding_mode"),
)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1, "dilation": 2, "groups": 2},
        {"padding": "same", "groups": 4},
        {"padding": 1, "padding_mode": "circular"},
    ],
)
def test_a_convolution_has_the_attributes_of_the_dense_one(ndim, options):
    dense = CONV[ndim](8, 12, 3, **options)
    slices = 8 // dense.groups // 2
    low = LOW_RANK[CONV[ndim]].from_dense(dense, rank=1, groups=max(slices, 1))
    for name in CONV_ATTRIBUTES:
        value = getattr(low, name)
        assert value == getattr(dense, name) and type(value) is type(getattr(dense, name)), name
    assert low.slices == max(slices, 1) and low.decomposition.groups == low.slices


def test_a_linear_layer_has_the_attributes_of_the_dense_one():
    low = alds.LowRankLinear.from_dense(nn.Linear(12, 6), rank=2, groups=3)
    assert (low.in_features, low.out_features, low.slices, low.groups) == (12, 6, 3, 3)
    assert not hasattr(low, "in_channels") and not hasattr(low, "kernel_size")
    new_head = nn.Linear(low.in_features, 5)
    assert new_head(torch.ones(2, 12)).shape == (2, 5)


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (alds.LowRankLinear(12, 6, 2), ("in_features", "out_features", "groups")),
        (alds.LowRankConv2d(4, 6, 3, 2), ("in_channels", "out_channels", "kernel_size", "groups", "output_padding")),
    ],
    ids=lambda v: type(v).__name__,
)
def test_attributes_of_the_shape_are_set_to_what_they_are(layer, names):
    for name in names:
        setattr(layer, name, getattr(layer, name))  # as transformers does with a head's out_features
        with pytest.raises(AttributeError, match=rf"{name} is .* by the shape of its factors and cannot be set to 99"):
            setattr(layer, name, 99)


def test_a_module_that_an_earlier_version_pickled_keeps_its_slices():
    layer = alds.LowRankConv2d(8, 6, 3, 2, groups=4, conv_groups=2, padding=1)
    state = dict(layer.__dict__)
    state["groups"] = state.pop("slices")
    earlier = alds.LowRankConv2d.__new__(alds.LowRankConv2d)
    earlier.__setstate__(state)
    x = torch.randn(2, 8, 5, 5)
    assert (earlier.slices, earlier.groups) == (4, 2) and torch.equal(earlier(x), layer(x))
    unpickled = pickle.loads(pickle.dumps(earlier))
    assert unpickled.slices == 4 and "groups" not in vars(unpickled) and torch.equal(unpickled(x), layer(x))


def low_rank_net():
    return nn.Sequential(alds.LowRankLinear(8, 8, 2), nn.ReLU(), alds.LowRankConv1d(8, 4, 1, 2))


def frozen(layer):
    return [not p.requires_grad for p in (layer.encoder, layer.decoder, layer.bias)]


def test_freezing_by_weight_freezes_the_factors():
    for layer in (m for m in low_rank_net() if isinstance(m, LowRankLayer)):
        assert layer.weight.requires_grad
        layer.weight.requires_grad = False
        assert frozen(layer) == [True, True, False] and not layer.weight.requires_grad
        assert layer.weight.requires_grad_() is not None and frozen(layer) == [False, False, False]
        layer.weight.requires_grad_(False)
        assert frozen(layer) == [True, True, False]
        layer.encoder.requires_grad = True  # one trained factor trains the weight
        assert layer.weight.requires_grad
        with pytest.raises((TypeError, RuntimeError)):
            layer.weight.requires_grad = "no"


def test_a_weight_that_was_taken_earlier_stays_true():
    layer = alds.LowRankLinear(8, 8, 2)
    weight = layer.weight
    layer.double().requires_grad_(False)
    assert weight.dtype == torch.float64 and not weight.requires_grad
    other = copy.deepcopy(layer)
    other.weight.requires_grad = True
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("name", ["data", "grad", "shape", "dtype", "mark"])
def test_nothing_else_of_a_weight_can_be_set(name):
    layer = alds.LowRankLinear(4, 8, 2)
    with pytest.raises(AttributeError, match=rf"LowRankLinear has no dense weight, so .weight.{name} .*to_dense\(\)"):
        setattr(layer.weight, name, torch.zeros(8, 4))


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(8, 4)), torch.zeros(8, 4), None])
def test_a_weight_cannot_be_put_in(value):
    layer = alds.LowRankLinear(4, 8, 2)
    before = {name: p.clone() for name, p in layer.state_dict().items()}
    with pytest.raises(AttributeError, match=r"LowRankLinear has no dense weight to set; .*to_dense\(\)"):
        layer.weight = value
    assert layer.state_dict().keys() == before.keys()


def test_its_own_weight_can_be_put_back():
    """As peft does when it takes its layers out."""
    layer, other = alds.LowRankLinear(4, 8, 2), alds.LowRankLinear(4, 8, 2)
    layer.weight = layer.weight
    assert layer.weight.shape == (8, 4) and "weight" not in vars(layer)
    with pytest.raises(AttributeError, match="no dense weight to set"):
        layer.weight = other.weight


def test_merged_layers_tell_their_sizes():
    merged = MergedLinears([alds.LowRankLinear(8, 8, 2), alds.LowRankLinear(8, 4, 3)])
    assert [(MergedPart(merged, i).in_features, MergedPart(merged, i).out_features) for i in (0, 1)] == [(8, 8), (8, 4)]


VALUE_USES = {
    "xavier": nn.init.xavier_uniform_, "kaiming": nn.init.kaiming_normal_, "zeros": nn.init.zeros_,
    "orthogonal": nn.init.orthogonal_, "trunc_normal": nn.init.trunc_normal_,
    "copy_": lambda w: w.copy_(torch.zeros(8, 4)), "clone": lambda w: w.clone(), "grad": lambda w: w.grad,
    "index": lambda w: w[0], "times": lambda w: 2.0 * w, "plus": lambda w: w + 1, "minus": lambda w: -w,
    "length": len, "loop": list, "set": lambda w: {w}, "equal": lambda w: torch.zeros(8, 4) == w,
    "data_ptr": lambda w: w.data_ptr(), "to": lambda w: w.to(torch.float64),
    "norm": torch.linalg.norm, "numpy": lambda w: w.numpy(),
}  # fmt: skip


@pytest.mark.parametrize("use", VALUE_USES.values(), ids=VALUE_USES)
def test_what_needs_the_values_of_a_weight_is_refused(use):
    layer = alds.LowRankLinear(4, 8, 2)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(AttributeError, match=r"LowRankLinear has no dense weight.*exclude=.*dense_weight\(\)"):
        use(layer.weight)
    assert all(torch.equal(p, before[name]) for name, p in layer.state_dict().items())


def test_an_in_place_product_is_refused():
    layer = alds.LowRankLinear(4, 8, 2)
    with pytest.raises(AttributeError, match="LowRankLinear has no dense weight"):
        layer.weight *= 0.5


def test_an_optimizer_refuses_it():
    layer = alds.LowRankLinear(4, 8, 2)
    with pytest.raises(TypeError, match="AbsentWeight"):
        torch.optim.SGD([{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias]}], lr=0.1)


class Scaled(nn.Linear):
    scale = 3.0

    @property
    def twice(self):
        return 2


def test_values_set_on_a_layer_or_declared_by_its_class_stay():
    net = nn.Sequential(Scaled(24, 24), nn.Linear(24, 24), nn.Conv2d(3, 24, 3))
    net[1].note, net[2].tag = "first", (1, 2)
    small = alds.compress(net, params=0.6)
    assert (small[0].scale, small[1].note) == (3.0, "first") and not hasattr(small[0], "twice")
    assert small[2].tag == (1, 2) and small[1].in_features == 24


def test_containers_of_replaced_weights_are_warned_of():
    net = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    net.penalised = {"first": net[0].weight}
    with pytest.warns(UserWarning, match=r"model.penalised\['first'\] holds a weight of a dense layer"):
        alds.compress(net, params=0.6)


def test_compressed_in_inference_mode_and_trained():
    with torch.inference_mode():
        small = alds.compress(nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)), params=0.6)
    small(torch.randn(2, 24)).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
