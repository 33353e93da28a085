"""``report``: what it counts is what is there, its table by hand, its files, and what it refuses."""

import json
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import alds_fast as alds
from alds_fast.errors import ArgumentError, MissingFileError, ModelError


class Counting(nn.Sequential):
    """It counts its runs, in a buffer."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, x):
        self.runs += 1
        return super().forward(x)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    dense = Counting(nn.Linear(64, 96), nn.ReLU(), nn.Dropout(0.5), nn.Linear(96, 32))
    return dense, alds.compress(dense, params=0.5)


def test_it_counts_what_is_there_and_leaves_models_as_they_were(models):
    dense, small = models
    x, before = torch.randn(16, 64), torch.get_rng_state()
    seen = alds.report(dense, small, x, rounds=3, evaluate=lambda model: float(model.training))
    assert torch.equal(torch.get_rng_state(), before) and dense.training and not any(m.runs for m in models)
    for name, model in zip(("dense", "compressed"), models, strict=True):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        params = small.alds_plan.params if model is small else small.alds_plan.params_before
        size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        model.runs.zero_()
        values = seen.values[name]
        assert (values["params"], values["flops"]) == (params, counter.get_total_flops())
        assert values["megabytes"] == size / 1e6 and values["quality"] == 0.0 and values["ms"] > 0
    low, high = seen.spreads["compressed"]
    assert low <= seen.ratios["compressed"]["ms"] <= high and seen.conditions["rounds"] in (3, 6, 9)
    assert seen.ratios["compressed"]["params"] == small.alds_plan.keep_ratio


BY_HAND = alds.Report(
    {
        "dense": {"params": 1000, "megabytes": 0.004, "flops": 0, "ms": 2.0, "quality": 0.9},
        "compressed": {"params": 500, "megabytes": 0.002, "flops": 0, "ms": 1.0, "quality": 0.89},
    },
    {"compressed": {"params": 0.5, "megabytes": 0.5, "ms": 0.5}},
    {"compressed": (0.49, 0.52)},
    {"device": "a CPU", "torch": "2.13", "threads": 2, "settings": [], "rounds": 9},
)


def test_the_table_by_hand():
    assert str(BY_HAND) == (
        "            dense  compressed  / dense\n"
        "---------------------------------------\n"
        "parameters  1,000         500    0.500\n"
        "MB          0.004       0.002    0.500\n"
        "FLOPs           0           0        -\n"
        "ms              2           1    0.500\n"
        "quality       0.9        0.89    -0.01\n"
        "a CPU, threads 2, torch 2.13, 9 rounds in turns; quartiles of the ratios of ms: compressed 0.490 to 0.520"
    )
    assert "| quality | 0.9 | 0.89 | -0.01 |\n\na CPU" in BY_HAND.to_markdown() and "<pre" in BY_HAND._repr_html_()
    assert repr(BY_HAND) == "<Report of dense, compressed; print() has the table>"
    noisy = alds.Report(BY_HAND.values, BY_HAND.ratios, {"compressed": (0.3, 0.7)}, BY_HAND.conditions)
    assert str(noisy).endswith("rounds were far apart: measure again on a quiet machine")


def test_files(tmp_path):
    for name in ("r.md", "r.json", "r.png", "r.SVG"):
        BY_HAND.save(tmp_path / name)
    assert (tmp_path / "r.md").read_text() == BY_HAND.to_markdown()
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["format"] == "alds_fast.report" and content["values"] == BY_HAND.values
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG" and b"<svg" in (tmp_path / "r.SVG").read_bytes()
    with pytest.raises(ArgumentError, match=r"does not end in \.md, \.json, \.png, \.pdf or \.svg"):
        BY_HAND.save(tmp_path / "r.txt")
    with pytest.raises(MissingFileError):
        BY_HAND.save(tmp_path / "none" / "r.md")


def test_refusals(models):
    dense, small = models
    x = torch.randn(2, 64)
    with pytest.raises(ArgumentError, match="rounds=1 is not an integer >= 2"):
        alds.report(dense, small, x, rounds=1)
    for others in ({}, {"dense": small}, {3: small}):
        with pytest.raises(ArgumentError, match="expected a model, or models by names other than 'dense'"):
            alds.report(dense, others, x)
    with pytest.raises(ModelError, match="model is a str|is a text"):
        alds.report(dense, "small.safetensors", x)
    with pytest.raises(ModelError, match="the model 'compressed' is on meta, the dense one on cpu"):
        alds.report(dense, nn.Linear(4, 4, device="meta"), x)
    with pytest.raises(ModelError, match="example_inputs"):
        alds.report(dense, small, torch.randn(2, 3))
    with pytest.raises(ArgumentError, match="evaluate returned nan: expected a finite number"):
        alds.report(dense, small, x, rounds=2, evaluate=lambda model: math.nan)
