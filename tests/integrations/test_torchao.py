"""torchao's quantize_ passes low-rank layers by, which it says."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast.integrations import warn_of_low_rank

torchao = pytest.importorskip("torchao.quantization")


def model():
    return nn.Sequential(nn.Linear(64, 64), alds.LowRankLinear(64, 64, 8), alds.LowRankLinear(64, 64, 8))


def test_a_compressed_model_is_quantised_with_a_word():
    small = model()
    before = copy.deepcopy(small[1:].state_dict())
    with pytest.warns(UserWarning, match=r"leaves 2 low-rank layers as they are, for example '1'; .*to_plain"):
        torchao.quantize_(small, torchao.Int8WeightOnlyConfig())
    assert type(small[0].weight.data) is not torch.Tensor
    assert all(torch.equal(p, before[name]) for name, p in small[1:].state_dict().items())


def test_nothing_is_said_of_other_models():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "quantize_ leaves")
        torchao.quantize_(nn.Sequential(nn.Linear(64, 64)), torchao.Int8WeightOnlyConfig())
        torchao.quantize_(alds.to_plain(model()).requires_grad_(False), torchao.Int8WeightOnlyConfig())
        warn_of_low_rank(nn.Sequential(alds.LowRankConv2d(4, 4, 3, 2)), "quantize_")  # never quantised by it


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import alds_fast, torchao.quantization", "import torchao.quantization, alds_fast"])
def test_any_order_of_imports(first):
    code = f"""
{first}
import warnings
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    quantize_(nn.Sequential(alds_fast.LowRankLinear(8, 8, 2)), Int8WeightOnlyConfig())
print(sum("to_plain" in str(w.message) for w in caught))"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "1", run.stderr
