"""Layers whose factors are stored without an identity: good modules, saved, loaded, refitted, merged, exported."""

import copy
import io

import pytest
import torch
from support.kernel_cases import ran
from support.models import count
from torch import nn

import alds_fast as alds
from alds_fast.errors import BackendError
from alds_fast.layers import LowRankLayer


def net():
    torch.manual_seed(0)
    convolutions = nn.Conv2d(8, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3, stride=2)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(216, 64), nn.ReLU(), nn.Linear(64, 48)).eval()


X = torch.randn(16, 8, 8, 8, generator=torch.Generator().manual_seed(1))
FORMS = {
    "output": {"groups": (1,), "schemes": (0,)},
    "input": {"groups": (2,), "schemes": (3,)},
}


def pivoted(form, **options):
    """Every layer with pivots of that form."""
    plan = alds.analyze(net(), **FORMS[form]).plan(**({"params": 0.6} | options))
    small = plan.apply(net())
    assert form in {row.pivots for row in plan.layers}
    return small


def low_rank(model):
    return [m for m in model.modules() if isinstance(m, LowRankLayer)]


@pytest.fixture(params=list(FORMS))
def small(request):
    return pivoted(request.param)


def test_they_are_good_modules(small):
    y = small(X)
    for layer in low_rank(small):
        assert f"pivots='{layer.pivots}'" in repr(layer) and "order" in layer.state_dict()
    y.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in small.parameters())
    torch.testing.assert_close(torch.export.export(small, (X,)).module()(X), y, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), y, rtol=1e-4, atol=1e-5)
    dense = copy.deepcopy(small)
    for name, layer in small.named_modules():
        if isinstance(layer, LowRankLayer):
            dense.set_submodule(name, layer.to_dense())
    torch.testing.assert_close(dense(X), y, rtol=1e-4, atol=1e-5)
    assert small.bfloat16()(X.bfloat16()).dtype == torch.bfloat16 and low_rank(small)[0].order.dtype == torch.int64


def test_indices_count_as_parameters(small):
    indices = sum(m.order.numel() for m in low_rank(small))
    assert count(small) == small.alds_plan.params == sum(p.numel() for p in small.parameters()) + indices


def test_they_are_pickled_saved_and_loaded(small, tmp_path):
    alds.save(small, tmp_path / "small.safetensors")
    assert torch.equal(alds.load(tmp_path / "small.safetensors", net())(X), small(X))
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X), small(X))
    other = pivoted(low_rank(small)[0].pivots)
    for m in low_rank(other):
        m.reset_parameters()
    assert not torch.allclose(other(X), small(X))
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(X), small(X))


def test_they_are_fitted_to_data_with_fixed_pivots_or_new_ones(small):
    batches = [torch.randn(32, 8, 8, 8) for _ in range(32)]  # 1,024 samples for 216 columns
    analysis = alds.analyze(net(), data=batches, **FORMS[low_rank(small)[0].pivots])
    plan = analysis.plan(params=0.6)
    refitted = plan.apply(net(), refit=batches)
    assert {m.pivots for m in low_rank(refitted)} == {low_rank(small)[0].pivots}
    assert "refitted" in {report.method for report in refitted.alds_factors.values()}
    wanted = net()(X).detach()
    assert (refitted(X) - wanted).norm() < (plan.apply(net())(X) - wanted).norm()
    layer = low_rank(refitted)[0]
    order = layer.order.clone()
    optimizer = torch.optim.SGD(refitted.parameters(), lr=1e-3)
    before = float((refitted(X) - wanted).square().mean())
    for _ in range(20):
        optimizer.zero_grad()
        (refitted(X) - wanted).square().mean().backward()
        optimizer.step()
    assert float((refitted(X) - wanted).square().mean()) < before and torch.equal(layer.order, order)


@pytest.mark.parametrize("form", list(FORMS))
def test_deploy_may_fill_the_identity_in(form):
    small, x = pivoted(form, params=0.4), X[:1, :, :4, :4]  # the interpreter takes long
    small = small[:4]
    fast, table = alds.deploy(small, x, rounds=1, report=True)
    torch.testing.assert_close(fast(x), small(x), rtol=1e-4, atol=1e-5)
    name, layer = next((n, m) for n, m in small.named_modules() if isinstance(m, LowRankLayer) and m.pivots)
    own = f"two-op, groups={layer.slices}, rank={layer.rank}"
    row = next(row for row in table.rows if row.name == name)
    assert {"two-op", own} <= set(row.times_ms) and "kernels take plain factors" in row.note
    assert f"pivots='{layer.pivots}'" in row.structure
    with pytest.raises(BackendError, match="kernels take plain factors, .*; deploy fills the identity in"):
        fused = copy.deepcopy(layer)
        fused.backend = "fused"
        fused(x)


def test_output_pivots_of_linear_layers_run_fused():
    small = pivoted("output", params=0.4)
    linear = next(m for m in low_rank(small) if isinstance(m, alds.LowRankLinear) and m.pivots == "output")
    for rows in (2, 20):
        x = torch.randn(rows, linear.in_features)
        expected = linear(x)
        fused = copy.deepcopy(linear)
        fused.backend = "fused"
        assert fused.why_not_fused(x) is None
        assert ran(lambda m=fused, x=x: m(x)).count("alds_fast.lowrank_linear.default") == 1
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
    _, table = alds.deploy(nn.Sequential(linear), x, rounds=1, report=True)
    assert "fused" in table.rows[0].times_ms and table.rows[0].errors["fused"] < 1e-5


def test_layers_that_read_one_input_are_merged():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.q(x) + self.k(x)

    torch.manual_seed(0)
    small = alds.compress(Attends(), params=0.7, groups=(1,))
    assert small.q.pivots == small.k.pivots == "output"
    merged = alds.layers.MergedLinears([small.q, small.k])
    x = torch.randn(5, 32)
    for y, layer in zip(merged(x), (small.q, small.k), strict=True):
        torch.testing.assert_close(y, layer(x))


def test_without_pivots_none_are_made_and_old_files_are_as_before():
    plan = alds.analyze(net()).plan(params=0.6, pivots=False)
    assert {row.pivots for row in plan.layers} == {""}
    small = plan.apply(net())
    assert all("order" not in name for name in small.state_dict())
    assert count(small) == sum(p.numel() for p in small.parameters())


def test_the_allocation_over_both_forms_is_never_worse():
    analysis = alds.analyze(net())
    for share in (0.3, 0.6, 0.9):
        with_pivots, plain = (analysis.plan(params=share, p=float("inf"), pivots=p) for p in (True, False))
        assert with_pivots.error <= plain.error and with_pivots.params <= share * analysis.params


def test_half_types_have_pivots_where_rounding_does_not_count():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).bfloat16()
    u, _, v = torch.linalg.svd(torch.randn(64, 64))
    for layer, base in zip(model, (0.5, 0.9), strict=True):  # the first is all but exact at low ranks
        layer.weight.data = (u * base ** torch.arange(64) @ v).bfloat16()
    rows = alds.analyze(model, groups=(1,)).plan(error=0.03).layers
    assert [row.pivots for row in rows] == ["", ""]
    rows = alds.analyze(model, groups=(1,)).plan(error=0.06).layers
    assert rows[1].pivots == "output" and rows[1].error >= 0.05
