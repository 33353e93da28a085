"""NaN and infinity in a model are found at the start, and named."""

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast.errors import WeightError
from alds_fast.layers import check_values, find_layers

NAN, INF = float("nan"), float("inf")


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 32), nn.Embedding(3, 32)).eval()
    model.register_buffer("mask", torch.full((4, 4), -INF).triu(1))
    return model


def spoil(model, name, value, where=3):
    tensor = dict([*model.named_parameters(), *model.named_buffers()])[name]
    with torch.no_grad():
        tensor.view(-1)[where] = value


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("2.bias", NAN, "'2': 1 of 32 values of its bias are NaN or infinite"),
        ("2.bias", INF, "'2': 1 of 32 values of its bias are NaN or infinite"),
        ("1.weight", -INF, "'1': 1 of 32 values of its weight are NaN or infinite"),
        ("3.weight", NAN, "'3': 1 of 96 values of its weight are NaN or infinite"),
        ("1.running_var", NAN, "'1': 1 of 32 values of its running_var are NaN"),
        ("mask", NAN, "the model itself: 1 of 16 values of its mask are NaN"),
        ("0.weight", NAN, "layer '0': 1 of 1024 weights are NaN"),
    ],
)
def test_what_would_spoil_the_compressed_model_is_named(name, value, words):
    model = net()
    spoil(model, name, value)
    with pytest.raises(WeightError) as refusal:
        alds.compress(model, params=0.8)
    assert words in str(refusal.value)


@pytest.mark.parametrize("options", [{}, {"sensitivity": True}, {"refit": True}])
@pytest.mark.parametrize("name", ["1.running_var", "2.bias"])
def test_with_data_the_right_layer_is_blamed(name, options):
    model = net()[:3]
    spoil(model, name, NAN)
    with pytest.raises(WeightError, match=f"'{name[0]}': 1 of 32 values of its {name[2:]} are NaN"):
        alds.compress(model, params=0.8, data=[torch.ones(4, 32)], **options)


def test_infinite_buffers_and_excluded_modules_are_legal():
    model = net()
    spoil(model, "2.bias", NAN)
    spoil(model, "2.weight", NAN)
    small = alds.compress(model, params=0.9, exclude="2")
    assert isinstance(small[0], alds.LowRankLinear) and torch.isinf(small.mask).any()
    with pytest.raises(WeightError, match="'2'"):
        alds.compress(model, params=0.9, exclude="3")


def test_tensors_whose_values_cannot_be_looked_at_are_passed_by():
    model = net()
    model.register_buffer("meta", torch.empty(3, device="meta"))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("eighth", torch.ones(3).to(torch.float8_e4m3fn))
    model.register_buffer("none", torch.empty(0))
    model.register_buffer("count", torch.tensor(3))
    check_values(model, find_layers(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_of_every_type(dtype):
    model = net().to(dtype)
    check_values(model, find_layers(model))
    spoil(model, "1.running_mean", NAN)
    with pytest.raises(WeightError, match="running_mean"):
        check_values(model, find_layers(model))
