"""Layers whose weight a forward uses itself stay dense; asking for its type or shape is nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alds_fast as alds
from alds_fast.errors import ModelError

REASON = "computes with its weight instead of calling it"


class Direct(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x):
        return self.b(F.linear(x, self.a.weight, self.a.bias))


class ByName(Direct):
    def forward(self, x):
        layer = self.a
        return self.b(x @ layer.weight.T)


class InMethod(Direct):
    def forward(self, x):
        return self.b(self._mix(x))

    def _mix(self, x):
        return F.linear(x, weight=self.a.weight)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(Asks() for _ in range(2))

    def forward(self, x):
        for part in self.parts:
            x = F.linear(x, part.a.weight)
        return self.parts[0].b(x)


class Asks(Direct):
    """Reads type, shape and device of the weight, and uses another's values in a method that forward does not call."""

    def forward(self, x):
        x = x.to(self.a.weight.dtype) if isinstance(self.a.weight, torch.Tensor) else x
        return self.b(self.a(x.view(-1, self.a.weight.shape[1]).to(self.a.weight.device)))

    def reset(self):
        self.a.weight.data.zero_()


@pytest.mark.parametrize("kind", [Direct, ByName, InMethod])
def test_forwards_that_use_a_weight(kind):
    net = kind()
    small = alds.compress(net, params=0.8, groups=(1,))
    reasons = {row.name: row.reason for row in small.alds_plan.layers}
    assert reasons == {"a": f"the forward of {kind.__name__} {REASON}", "b": None}
    assert small(torch.randn(3, 24)).isfinite().all()


def test_layers_of_a_list_and_of_modules_further_down():
    reasons = {layer.name: layer.reason for layer in alds.analyze(Deep()).layers}
    assert [n for n, reason in reasons.items() if reason] == ["parts.0.a", "parts.1.a"]


def test_asking_is_not_reading():
    assert all(layer.reason is None for layer in alds.analyze(Asks()).layers)


def made_at_run_time():
    space = {"nn": nn, "F": F}
    exec(
        "class Hidden(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)\n"
        "    def forward(self, x):\n"
        "        return self.b(F.linear(x, self.a.weight))\n",
        space,
    )
    return space["Hidden"]()


def test_where_there_is_no_source_inputs_tell():
    net, x = made_at_run_time(), torch.randn(8, 24)
    for options in ({"data": [x]}, {"example_inputs": x}, {"data": [x], "refit": True}):
        with pytest.raises(ModelError, match=r"with the weight of layer 'a' instead of calling it.*exclude=\['a'\]"):
            alds.compress(net, params=0.6, **options)
    assert alds.compress(net, params=0.8, exclude="a", data=[x], groups=(1,))(x).isfinite().all()
