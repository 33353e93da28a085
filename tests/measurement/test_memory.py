"""Peaks of activations: by hand, against tensors followed one by one, and without a trace."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from support.models import images, small_net
from support.storages import followed_peak
from torch import nn

from alds_fast.errors import ArgumentError
from alds_fast.measurement import peak_of_activations


class Branches(nn.Module):
    """Two products of x that are alive together, a layer called twice, and a buffer that every run changes."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.twice = nn.Linear(8, 100), nn.Linear(8, 100), nn.Linear(100, 100)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, *, scale):
        self.calls += 1
        left, right = self.left(x), self.right(x)
        return self.twice(self.twice(left)).double() + scale * right.double()


def test_counted_by_hand():
    x, row = torch.randn(6, 8), 6 * 100
    held = peak_of_activations(
        Branches(), {"x": x, "scale": torch.tensor(2.0, dtype=torch.float64)}, ["left", "right", "twice"]
    )
    assert held.of_layers == {"left": 4 * row, "right": 8 * row, "twice": 16 * row}
    assert held.whole == 8 * row + 3 * 8 * row  # left and right, and three in float64: twice, right and its multiple


@pytest.mark.parametrize("width", [8, 300])
def test_inputs_and_weights_do_not_count(width):
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 2, bias=False)).eval()
    x = torch.randn(10, 64)
    held = peak_of_activations(model, x)
    assert held.whole == followed_peak(model, x) == 2 * 4 * 10 * width and held.of_layers == {}


def test_what_operators_take_for_themselves_counts_too():
    model, x = small_net(), images()
    assert peak_of_activations(model, x).whole >= followed_peak(model, x) >= 2 * 4 * 4 * 24 * 12 * 12


def test_the_model_stays_as_it_was():
    model, x = Branches().train(), torch.randn(6, 8)
    before, environment = copy.deepcopy(model.state_dict()), dict(os.environ)
    torch.manual_seed(3)
    follows = torch.rand(1)
    torch.manual_seed(3)
    assert peak_of_activations(model, {"x": x, "scale": torch.ones(())}, ["left"]) == peak_of_activations(
        model, {"x": x, "scale": torch.ones(())}, ["left"]
    )
    assert torch.equal(torch.rand(1), follows) and model.training and not model.left._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert dict(os.environ) == environment


def test_nothing_is_said_where_the_profiler_is_used_for_the_first_time():
    """In a process of its own: torch's profiler reads once per process how much it is to say."""
    code = """
import torch
from alds_fast.measurement import peak_of_activations
for _ in range(2):
    print(peak_of_activations(torch.nn.Linear(2, 2), torch.zeros(1, 2)).whole)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("8\n8\n", "")


def test_another_profiler_is_in_the_way():
    with (
        torch.autograd.profiler.profile(),
        pytest.raises(ArgumentError, match="torch's profiler, which is running already"),
    ):
        peak_of_activations(nn.Linear(2, 2), torch.zeros(1, 2))
    assert peak_of_activations(nn.Linear(2, 2), torch.zeros(1, 2)).whole == 8
