"""Several processes that share batches and layers fit the factors of one, and plan as one does."""

import copy
import dataclasses
from collections import Counter

import pytest
import torch
from support.worlds import in_worlds
from torch import nn

import alds_fast as alds
from alds_fast.blocks import find_chain
from alds_fast.criteria import Basis
from alds_fast.factors import refit
from alds_fast.layers import LowRankLayer, decomposable
from alds_fast.measurement import private_runs
from alds_fast.processes import World


class Block(nn.Module):
    """Three layers that read one tensor, and one that reads what they return."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=bias) for bias in (True, False, True))
        self.out = nn.Linear(16, 16)

    def forward(self, x):
        return x + self.out((self.q(x) * self.k(x)).tanh() + self.v(x))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def analysed():
    torch.manual_seed(0)
    model = Tower().eval()
    data = [2 + torch.randn(4, 6, 16) @ torch.randn(16, 16) / 4 for _ in range(5)]
    return model, data, alds.analyze(model, groups=(1,), data=data)


def refitted(models, analysis, data, world, told):
    small, model = models
    with private_runs(model) as run:
        chain = find_chain(model, run, [(1, data[0])], "refit=")
    layers = [dataclasses.replace(layer, module=model.get_submodule(layer.name)) for layer in
              decomposable(analysis.layers)]  # fmt: skip
    reports = refit(small, model, layers, data, gradients={}, bias_correction=True, mask=None, chain=chain, world=world,
                    done=lambda name, report: told.append(name))  # fmt: skip
    return small, reports


@pytest.mark.parametrize("size", [2, 3, 5])
def test_factors_of_one_process(analysed, size):
    model, data, analysis = analysed
    drafted = analysis.plan(params=0.6).apply(model)
    told = [[] for _ in range(size + 1)]
    want, reports = refitted((copy.deepcopy(drafted), model), analysis, data, World(), told[size])
    models = [(copy.deepcopy(drafted), copy.deepcopy(model)) for _ in range(size)]
    results = in_worlds(size, lambda w: refitted(models[w.rank], analysis, data, w, told[w.rank]))
    low = [name for name, module in want.named_modules() if isinstance(module, LowRankLayer)]
    assert len(low) >= 6 and reports.keys() == set(low)
    assert any(not torch.equal(want.get_submodule(n).encoder, drafted.get_submodule(n).encoder) for n in low)
    for got, others in results:
        assert others.keys() == reports.keys()
        for name, tensor in want.state_dict().items():
            assert torch.allclose(got.state_dict()[name], tensor, atol=1e-5), name
        for name, tensor in results[0][0].state_dict().items():
            assert torch.equal(got.state_dict()[name], tensor), name
    assert told == [told[size]] * (size + 1)


@pytest.mark.parametrize("size", [2, 3])
def test_plan_of_one_process(analysed, monkeypatch, size):
    *_, analysis = analysed
    want, computed, own = analysis.plan(params=0.6), Counter(), Basis._distance

    def counting(basis, layer):
        computed[layer.name] += 1
        return own(basis, layer)

    monkeypatch.setattr(Basis, "_distance", counting)
    alone = [dataclasses.replace(analysis, _errors={}, _bases={}) for _ in range(size)]
    plans = in_worlds(size, lambda world: dataclasses.replace(alone[world.rank], world=world).plan(params=0.6))
    assert {plan.to_json() for plan in plans} == {want.to_json()}
    assert computed == {layer.name: 1 for layer in decomposable(analysis.layers)}
