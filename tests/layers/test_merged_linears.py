"""Linear layers that read the same input share one encoder call: the module, finding them, and deploy."""

import copy

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast.deployment import DeployTable, autotune
from alds_fast.errors import ArgumentError, BackendError
from alds_fast.layers import MergedLinears, MergedPart
from alds_fast.measurement import shared_inputs
from alds_fast.measurement.timing import timer

NAMES = ("q", "k", "v", "gate", "up", "other")


class Block(nn.Module):
    """q, k, v read one tensor, gate and up another, other a third."""

    def __init__(self, width=32):
        super().__init__()
        torch.manual_seed(0)
        for i, name in enumerate(NAMES):
            self.add_module(name, alds.LowRankLinear(width, width, 3 + i, bias=i % 2 == 0))

    def forward(self, x):
        h = self.q(x) * self.k(x) + self.v(x)
        y = h + 0
        return self.other(torch.relu(self.gate(y)) * self.up(y)) + x


def merged(model):
    """The block with q, k, v merged by hand."""
    new = copy.deepcopy(model)
    owner = MergedLinears([new.q, new.k, new.v])
    new.q, new.k, new.v = (MergedPart(owner, i) for i in range(3))
    return new


@pytest.mark.parametrize("backend", ["two-op", "fused", "auto"])
def test_outputs_are_those_of_the_layers(backend):
    layers, x = [alds.LowRankLinear(32, f, r, bias=b) for f, r, b in ((8, 3, True), (17, 5, False))], torch.randn(4, 32)
    for output, layer in zip(MergedLinears(layers, backend)(x), layers, strict=True):
        torch.testing.assert_close(output, layer(x), rtol=1e-5, atol=1e-5)


def test_one_encoder_call_for_all_parts(monkeypatch):
    model, x, seen = Block(), torch.randn(4, 32), []
    new = merged(model)
    run = MergedLinears.forward
    monkeypatch.setattr(MergedLinears, "forward", lambda self, x: seen.append(1) or run(self, x))
    with torch.no_grad():
        torch.testing.assert_close(new(x), model(x), rtol=1e-5, atol=1e-5)
        assert len(seen) == 1 and new.q.merged._last is None  # nothing is kept alive
        with torch.inference_mode():
            fresh = x.clone()  # has no version counter: every output by itself
            torch.testing.assert_close(new(fresh), model(fresh), rtol=1e-5, atol=1e-5)
        assert len(seen) == 1


def test_factors_changed_in_between_are_noticed():
    model, x = Block(), torch.randn(4, 32)
    new = merged(model)
    with torch.no_grad():
        new.q(x)
        new.q.merged.decoders[1].zero_()
        torch.testing.assert_close(new.k(x), torch.zeros(4, 32))  # k has no bias
        new.q(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert new.v(x).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.float16):
            assert new.k(x).dtype == torch.float16


def test_backward_through_one_part_after_the_other():
    new, x = merged(Block()), torch.randn(4, 32)
    new.q(x).sum().backward()
    new.k(x).sum().backward()
    assert new.q.merged.encoder.grad.abs().sum() > 0


def test_an_input_changed_in_between_is_noticed():
    model, x = Block(), torch.randn(4, 32)
    new = merged(model)
    with torch.no_grad():
        first = new.q(x)
        x.mul_(2)
        torch.testing.assert_close(new.k(x), model.k(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(new.q(x.clone()), 2 * first - model.q.bias, rtol=1e-4, atol=1e-5)


def test_parts_called_twice_and_out_of_order():
    model, x = Block(), torch.randn(4, 32)
    new = merged(model)
    for name in ("v", "v", "q", "k", "q", "v"):
        torch.testing.assert_close(getattr(new, name)(x), getattr(model, name)(x), rtol=1e-5, atol=1e-5)


def test_merged_layers_train():
    model, x = Block(), torch.randn(4, 32)
    new = merged(model)
    with torch.no_grad():
        new.q(x)  # kept without a graph; must not be used below
    for net in (model, new):
        net(x).square().sum().backward()
    encoders = torch.cat([model.q.encoder.grad, model.k.encoder.grad, model.v.encoder.grad])
    torch.testing.assert_close(new.q.merged.encoder.grad, encoders, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_merged_layers_compile_and_copy():
    torch._dynamo.reset()
    model, x = Block().eval(), torch.randn(4, 32)
    new = merged(model)
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    new.q(x)
    torch.testing.assert_close(torch.export.export(new, (x,)).module()(x), model(x), rtol=1e-5, atol=1e-5)
    copied = copy.deepcopy(new)
    assert copied.q.merged is copied.k.merged and copied.q.merged._last is None
    copied.load_state_dict(new.state_dict())


def test_shared_inputs():
    groups = shared_inputs(Block(), torch.randn(4, 32), NAMES)
    assert groups == [("q", "k", "v"), ("gate", "up")]

    class InPlace(Block):
        def forward(self, x):
            x = x + 0
            q = self.q(x)
            return q + self.k(x.mul_(2)) + self.v(x)

    assert shared_inputs(InPlace(), torch.randn(4, 32), NAMES) == [("k", "v")]


def test_what_cannot_be_merged():
    with pytest.raises(ArgumentError, match="the same number of features"):
        MergedLinears([alds.LowRankLinear(16, 8, 2), alds.LowRankLinear(32, 8, 2)])
    with pytest.raises(ArgumentError, match=r"groups=\[2\]"):
        MergedLinears([alds.LowRankLinear(16, 8, 2, groups=2)])
    many = MergedLinears([alds.LowRankLinear(16, 8, 2)] * 2, "fused")
    with pytest.raises(BackendError, match="up to 16 rows"):
        many(torch.randn(17, 16))


def _timer(monkeypatch, cost):
    def interleaved_ms(calls, device, *, rounds):
        return {name: [cost(name)] * rounds for name in calls}

    for module in (autotune, timer):
        monkeypatch.setattr(module, "interleaved_ms", interleaved_ms)


@pytest.mark.parametrize("merge", [True, False])
def test_deploy_merges_where_that_is_faster(monkeypatch, tmp_path, merge):
    costs = {"dense": 3.0, "separate": 2.0, "two-op": 1.0 if merge else 2.0, "fused": 4.0, "deployed": 0.9}
    _timer(monkeypatch, lambda name: costs[name.split(",")[0]])
    model, x = Block(), torch.randn(4, 32)
    fast, table = alds.deploy(model, x, report=True)
    rows = {row.name: row for row in table.rows if row.kind == "merged"}
    assert set(rows) == {"q + k + v", "gate + up"} and all(
        r.won == ("two-op" if merge else "separate") for r in rows.values()
    )
    assert sum(isinstance(m, MergedPart) for m in fast.modules()) == (5 if merge else 0)
    if merge:
        assert rows["gate + up"].ratio == 2.0 and fast.q.merged.backend == "two-op"
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    table.save(tmp_path / "t.json")
    redeployed, reused = alds.deploy(model, x, table=DeployTable.load(tmp_path / "t.json"), report=True)
    assert all(row.source == "table" for row in reused.rows)
    torch.testing.assert_close(redeployed(x), model(x), rtol=1e-4, atol=1e-5)
