"""compress(refine=) and Plan.apply(refine=): what refine() makes, and refusals before the work."""

import math
import re

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast.errors import ArgumentError, ModelError


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()


def batches(count=6):
    return [torch.randn(8, 6, 16, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def same(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("refit", (False, True))
def test_it_is_what_the_three_calls_make(refit):
    model, data = encoder(), batches()
    small = alds.compress(model, params=0.6, data=data, refit=refit)
    expected, report = alds.refine(small, model, data, epochs=2)
    refined = alds.compress(model, params=0.6, data=data, refit=refit, refine=2)
    better = [block.block for block in report if block.after < block.before]
    assert better
    assert same(refined, expected) and not same(refined, small)
    assert refined.alds_plan == small.alds_plan
    assert {r.method for r in small.alds_factors.values()} == {"refitted" if refit else "weighted"}
    assert str(refined.alds_factors) == str(expected.alds_factors)
    for name, factors in refined.alds_factors.items():
        if "self_attn" in name:  # opened in the compressed model alone
            continue
        dense, low = model.get_submodule(name).weight, refined.get_submodule(name).dense_weight()
        if name.rpartition(".")[0].startswith(tuple(better)):
            assert factors.method == "refined" and math.isnan(factors.data_error)
        else:
            assert factors == small.alds_factors[name]
        assert factors.error == pytest.approx(float(((low - dense).norm() / dense.norm()).detach()), rel=1e-4)


def test_a_plan_without_data_is_refined_too():
    model, data = encoder(), batches()
    plan = alds.analyze(model).plan(params=0.6)
    expected, _ = alds.refine(plan.apply(model), model, data)
    assert same(plan.apply(model, refine=data), expected)
    assert same(alds.compress(model, params=0.6, data=data, refine=True), alds.compress(
        model, params=0.6, data=data, refine=3
    ))  # fmt: skip


class Unseen(nn.Module):
    """Fails the test if more of it is run than one batch."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), set()

    def forward(self, x):
        assert len(x) == 8, "it was run on more than the first batch"
        return self.net(x)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"refine": 0}, ArgumentError, "refine=0 is neither True nor False nor a number of passes"),
        ({"refine": 1.5}, ArgumentError, "refine=1.5 is neither"),
        ({"refine": "yes"}, ArgumentError, "refine='yes' is neither"),
        ({"refine": True, "data": None}, ArgumentError, "refine=True: data= is a NoneType"),
        ({"refine": 2, "data": iter(batches())}, ArgumentError, "refine=2: data= is an iterator"),
        ({"blocks": "net"}, ArgumentError, "blocks='net' goes with refit= or refine="),
        ({"refine": True, "blocks": "blocks"}, ArgumentError, "blocks='blocks' is no list of the model; it has net"),
        ({"refine": True, "blocks": 3}, ArgumentError, "blocks=3: expected names of lists"),
        ({"refine": True, "data": batches(1)}, ArgumentError, "refine= has 1 batches; give two"),
        ({"refine": True}, ModelError, "refine() needs a chain of blocks: the model has 0 modules"),
    ],
)
def test_refusals_before_the_work(options, error, text):
    data = [torch.randn(8, 16), torch.randn(9, 16)]
    with pytest.raises(error, match=re.escape(text)):
        alds.compress(Unseen(), params=0.6, **{"data": data, **options})


def test_lists_of_blocks_by_hand():
    model, data = encoder(), batches()
    expected = alds.compress(model, params=0.6, data=data, refit=True, refine=True)
    assert same(alds.compress(model, params=0.6, data=data, refit=True, refine=True, blocks="layers"), expected)
    plan = alds.analyze(model).plan(params=0.6)
    small = plan.apply(model, refit=data)
    for go in (
        lambda name: plan.apply(model, refit=data, blocks=name),
        lambda name: alds.refine(small, model, data, blocks=[name]),
    ):
        with pytest.raises(ArgumentError, match="'layer' is no list of the model; it has layers"):
            go("layer")
        go("layers")
    with pytest.raises(ArgumentError, match="blocks='layers' goes with refit= or refine="):
        plan.apply(model, blocks="layers")


def test_half_types_and_wrong_numbers_are_refused_before_the_factors():
    model = encoder()
    with pytest.raises(ArgumentError, match=r"torch.bfloat16, in which small steps get lost: refine= takes models"):
        alds.compress(model.bfloat16(), params=0.6, data=[x.bfloat16() for x in batches()], refine=True)
    plan = alds.analyze(encoder()).plan(params=0.6)
    with pytest.raises(ArgumentError, match="epochs=0 is not an integer >= 1"):
        plan.apply(encoder(), refine=batches(), epochs=0)
    with pytest.raises(ArgumentError, match="refine= is a Tensor: expected batches"):
        plan.apply(encoder(), refine=batches()[0])
