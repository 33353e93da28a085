"""Files that an earlier version wrote load, and the models in them compute what they did."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import count, images, small_net

import alds_fast as alds

FOLDER = Path(__file__).parents[1] / "data" / "before_wings"


@pytest.fixture(scope="module")
def expected():
    return load_file(FOLDER / "expected.safetensors")


def _close(y, wanted):
    """Equal but for the rounding of other processors' kernels."""
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_saved_model(expected):
    model = alds.load(FOLDER / "model.safetensors", small_net(seed=1))
    assert any(isinstance(m, alds.LowRankConv2d) for m in model.modules())
    _close(model(images(2)), expected["model"])


@torch.no_grad()
def test_a_plan(expected):
    plan = alds.Plan.from_json((FOLDER / "plan.json").read_text())
    model = small_net()
    assert plan.params <= 0.6 * count(model) and plan.params_before == count(model)
    _close(plan.apply(model)(images(2)), expected["model"])


@torch.no_grad()
def test_a_checkpoint_directory(expected):
    model = alds.from_pretrained(FOLDER / "checkpoint")
    assert any(isinstance(m, alds.LowRankLinear) for m in model.modules())
    ids = (torch.arange(12) * 7 % 48).view(1, 12)
    _close(model(input_ids=ids).logits[0, -1], expected["checkpoint"])
