"""measured_importance(): what a layer's error does to the output, one layer at a time."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast import errors
from alds_fast.measurement import without_fast_paths


class Named(nn.Module):
    """A model that names its logits."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return SimpleNamespace(logits=self.net(x))


def chain(depth=4):
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(
        nn.Linear(8, 16), nn.TransformerEncoder(block, depth, enable_nested_tensor=False), nn.Linear(16, 12)
    ).eval()


def batches(count=3):
    torch.manual_seed(1)
    return [torch.randn(4, 6, 8) for _ in range(count)]


def by_hand(model, plan, small, data, distance):
    """Whole runs of copies."""
    found = {}
    for row in plan.layers:
        if row.rank is not None and row.error > 0:
            one = copy.deepcopy(model)
            one.set_submodule(row.name, small.get_submodule(row.name))
            with torch.no_grad(), without_fast_paths():
                found[row.name] = math.sqrt(distance([(model(x), one(x)) for x in data])) / row.error
    middle = sorted(found.values())[len(found) // 2]
    return {name: min(4.0, max(0.25, value / middle)) for name, value in found.items()}


def relative(pairs):
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs))


def divergence(pairs):
    logs = [(a.logits.log_softmax(-1), b.logits.log_softmax(-1)) for a, b in pairs]
    return float(sum((a.exp() * (a - b)).sum() for a, b in logs)) / sum(a[..., 0].numel() for a, _ in logs)


@pytest.mark.parametrize(
    ("wrap", "distance"), [(lambda net: net, relative), (Named, divergence)], ids=["distance", "kl"]
)
def test_it_is_that_of_whole_runs(wrap, distance):
    model, data = wrap(chain()), batches()
    plan = alds.analyze(model, data=data, exclude="*self_attn*").plan(params=0.75)
    small = plan.apply(model)
    states, told = [copy.deepcopy(net.state_dict()) for net in (model, small)], []
    found = alds.measured_importance(plan, small, model, data, progress=lambda *args: told.append(args))
    assert found == pytest.approx(by_hand(model, plan, small, data, distance), rel=1e-3)
    assert len({round(value, 3) for value in found.values()}) > 4 and "net.0" not in found
    assert told[-1] == ("layers measured", len(found), len(found))
    for net, state in zip((model, small), states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_what_is_no_chain_is_run_as_a_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 8)).eval()
    data = [torch.randn(4, 3, 8, 8)]
    plan = alds.analyze(model, data=data).plan(params=0.4)
    small = plan.apply(model)
    found = alds.measured_importance(plan, small, model, data)
    assert found == pytest.approx(by_hand(model, plan, small, data, relative), rel=1e-3) and len(found) >= 2


def test_a_layer_that_the_output_hardly_sees_gets_the_least():
    model, data = chain(), batches()
    with torch.no_grad():
        model[1].layers[0].linear2.weight.mul_(1e-3)
    plan = alds.analyze(model, data=data, exclude="2").plan(params=0.75)
    found = alds.measured_importance(plan, plan.apply(model), model, data, limit=10.0)
    assert found["1.layers.0.linear2"] == 0.1 and max(found.values()) <= 10.0
    again = alds.analyze(model, data=data, exclude="2").plan(params=0.75, importance=found)
    ranks = [next(r.rank for r in p.layers if r.name == "1.layers.0.linear2") for p in (plan, again)]
    assert ranks[1] < ranks[0]


def test_what_it_cannot_take():
    model, data = chain(2), batches()
    plan = alds.analyze(model).plan(params=0.75)
    small = plan.apply(model)
    with pytest.raises(errors.ArgumentError, match=r"limit=1.0 is outside \(1, inf\)"):
        alds.measured_importance(plan, small, model, data, limit=1.0)
    with pytest.raises(errors.ArgumentError, match="data"):
        alds.measured_importance(plan, small, model, [])
    with pytest.raises(errors.LayerNotFoundError, match=r"layer '0' of the plan is not in both models"):
        alds.measured_importance(plan, small, nn.Linear(8, 8), data)
    with pytest.raises(errors.ModelError, match="measured_importance"):
        alds.measured_importance(plan, small, model, [torch.randn(2, 5)])
