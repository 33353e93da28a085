"""torch's quantize_dynamic passes low-rank layers by, which it says."""

import warnings

import pytest
import torch
from torch import nn

import alds_fast as alds

quantize_dynamic = torch.ao.quantization.quantize_dynamic
QCONFIG = torch.ao.quantization.default_dynamic_qconfig
pytestmark = pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
LINEAR = [
    ({}, 2),
    ({"dtype": torch.float16}, 2),
    ({"qconfig_spec": {nn.Linear}}, 2),
    ({"qconfig_spec": {nn.Linear: QCONFIG, nn.LSTM: QCONFIG}}, 2),
    ({"qconfig_spec": {"1"}}, 1),
    ({"qconfig_spec": {"": QCONFIG}}, 2),
]


def model():
    return nn.Sequential(nn.Linear(64, 64), alds.LowRankLinear(64, 64, 8), alds.LowRankLinear(64, 64, 8))


@pytest.mark.parametrize(("options", "layers"), LINEAR)
def test_dynamic_quantisation_says_what_it_leaves(options, layers):
    small = model()
    with pytest.warns(UserWarning, match=f"quantize_dynamic leaves {layers} low-rank layers .* '1'; .*to_plain"):
        quantised = quantize_dynamic(small, **options)
    assert {type(layer) for layer in quantised[1:]} == {alds.LowRankLinear}


def test_dynamic_quantisation_of_parts_and_of_other_layers():
    nested = nn.ModuleDict({"first": nn.Linear(64, 64), "second": model()})
    with pytest.warns(UserWarning, match="quantize_dynamic leaves 2 low-rank layers .* 'second.1'"):
        torch.quantization.quantize_dynamic(nested, {"second"})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "quantize_dynamic leaves")
        quantize_dynamic(nested, {"first"})
        quantize_dynamic(model(), {nn.LSTM})
        quantize_dynamic(model(), dtype=torch.quint8)
        plain = quantize_dynamic(alds.to_plain(model()), {nn.Linear}, torch.qint8)
    assert not any(type(module) is nn.Linear for module in plain.modules())
