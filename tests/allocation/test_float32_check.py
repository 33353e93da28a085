"""Spectra in float32: how far off they are, and plans that are those of float64 all the same."""

import math

import pytest
import torch
from support import checkpoints
from support.bands import BIASED, KINDS, check_band, weight
from support.marks import slow
from torch import nn

import alds_fast as alds
from alds_fast import errors, linalg
from alds_fast.allocation import float32_check
from alds_fast.linalg.torch_backend import spectra_torch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 1, 4), (1, 2)), ((2, 7, 12), (1, 3)), ((1, 64, 256), (1, 2, 4, 64)), ((1, 300, 200), (1, 2, 8)),
     slow((1, 768, 768), (1, 2)), slow((1, 1050, 1100), (1, 4)), slow((1, 1536, 1024), (1,))],
)  # fmt: skip
def test_float32_spectra_are_within_the_band(kind, shape, groups):
    torch.manual_seed(0)
    matrix = weight(kind, *shape)
    pairs = zip(linalg.spectra([matrix], [groups], float32=True)[0], linalg.spectra([matrix], [groups])[0], strict=True)
    for k, (values, expected) in zip(groups, pairs, strict=True):
        check_band(matrix, k, values, expected)


@pytest.mark.parametrize("kind", BIASED)
@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 16, 8192), (1, 2)), ((1, 64, 4096), (1, 2)), ((1, 512, 512), (1, 2))]
)
def test_float32_spectra_of_rank_deficient_and_repeated_weights(kind, shape, groups):
    test_float32_spectra_are_within_the_band(kind, shape, groups)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_float32_spectra_of_very_small_and_large_weights(scale):
    torch.manual_seed(0)
    matrix = torch.randn(1, 20, 30) * scale
    check_band(matrix, 2, linalg.spectra([matrix], [[2]], float32=True)[0][0], linalg.spectra([matrix], [[2]])[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_cuda_implementation_on_small_matrices(kind):
    torch.manual_seed(0)
    matrix = weight(kind, 2, 60, 80)
    for k in (1, 4):
        values = spectra_torch(matrix, [k], float32=True).unflatten(1, (k, -1))
        check_band(matrix, k, values, linalg.spectra([matrix], [[k]])[0][0])


def test_float32_spectra_refuse_what_float64_ones_do():
    bad = torch.ones(1, 3, 4)
    bad[0, 1, 2] = math.nan
    with pytest.raises(errors.ArgumentError, match="NaN, infinite or too large to square"):
        linalg.spectra([bad], [[1]], float32=True)


def test_float32_spectra_do_not_depend_on_the_number_of_threads_or_on_what_else_is_computed():
    torch.manual_seed(0)
    matrices, before = [torch.randn(1, 70, 90), torch.randn(2, 40, 40)], torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linalg.spectra(matrices, [[1, 2], [1, 4]], float32=True))
        results.append(
            [linalg.spectra([m], [ks], float32=True)[0] for m, ks in zip(matrices, ([1, 2], [1, 4]), strict=True)]
        )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for x, y in zip(results[0], other, strict=True) for a, b in zip(x, y, strict=True))


def network(kind):
    torch.manual_seed(0)
    layers = [
        nn.Linear(96, 64),
        nn.Linear(64, 64),
        nn.Conv2d(16, 32, 3),
        nn.Conv2d(32, 32, 3, groups=2),
        nn.Conv1d(12, 30, 5),
    ]
    for layer in layers:
        flat = weight(kind, 1, layer.weight.shape[0], layer.weight[0].numel())
        layer.weight.data = flat.view_as(layer.weight)
    return nn.Sequential(*layers)


def choices(plan):
    return [row.choice for row in plan.layers]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [slow(1.0), 2.0, slow(4.0), math.inf])
def test_the_plan_is_that_of_float64(kind, p):
    net = network(kind)
    narrow, double = alds.analyze(net, precision="float32"), alds.analyze(net)
    assert all(s.float32 for s in narrow.spectra.values()) and not any(s.float32 for s in double.spectra.values())
    for params in (0.7, 0.5, 0.2):
        plan, expected = (a.plan(params=params, p=p) for a in (narrow, double))
        assert choices(plan) == choices(expected)
        assert [r.error for r in plan.layers] == pytest.approx([r.error for r in expected.layers], rel=1e-3, abs=1e-12)
        assert plan.gap == pytest.approx(expected.gap, abs=1e-4)


def twins(difference):
    """Two layers of the same spectrum up to a relative difference, and no room for a rank more in both."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    u, _, v = torch.linalg.svd(torch.randn(32, 32, dtype=torch.float64))
    values = torch.linspace(2, 1, 32, dtype=torch.float64)
    for i, layer in enumerate(net):
        values[20:] *= 1 + i * difference
        layer.weight.data = ((u * values) @ v).float()
    return net


@pytest.mark.parametrize(
    ("pivots", "ranks", "params"), [(False, [10, 11], 21 * 64), (True, [12, 13], 12 * 52 + 13 * 51 + 2 * 32)]
)
def test_layers_in_doubt_are_computed_in_float64(pivots, ranks, params):
    close, far = (alds.analyze(twins(d), groups=(1,), precision="float32") for d in (1e-6, 0.1))
    for analysis, in_doubt in ((close, True), (far, False)):
        options = {"params": params / 2048, "p": math.inf, "pivots": pivots}
        plan = analysis.plan(**options)
        assert sorted(row.rank for row in plan.layers) == ranks
        assert {bool(s.float32) for s in analysis.spectra.values()} == {not in_doubt}
        assert choices(plan) == choices(alds.analyze(analysis.model, groups=(1,)).plan(**options))


def test_small_errors_are_computed_in_float64():
    net = network("low rank")
    analysis = alds.analyze(net, precision="float32")
    plan = analysis.plan(params=0.7)
    small = [row for row in plan.layers if row.choice and row.error**2 < float32_check.SMALL]  # then some slice's is
    assert small and not any((r.scheme, r.groups) in analysis.spectra[r.name].float32 for r in small)


@pytest.mark.parametrize(
    "options",
    [{"error": 0.3}, {"params": 0.5, "criterion": "operator"}, {"params": 0.5, "method": "svd"},
     {"params": 0.5, "flops": 0.6, "example_inputs": torch.randn(2, 96)}],
)  # fmt: skip
def test_plans_that_cannot_be_checked_are_made_of_float64(options):
    net = nn.Sequential(*network("falling")[:2])
    analysis = alds.analyze(net, precision="float32")
    plan = analysis.plan(**options)
    assert not any(s.float32 for s in analysis.spectra.values())
    expected = alds.analyze(net).plan(**options)
    assert choices(plan) == choices(expected)
    assert [row.error for row in plan.layers] == pytest.approx([row.error for row in expected.layers], rel=1e-12)


def test_importance_and_flops_are_checked_too():
    net = nn.Sequential(*network("falling")[:2])
    options = {"flops": 0.5, "example_inputs": torch.randn(2, 96), "importance": {"0": 3.0, "1": 0.0}}
    analysis = alds.analyze(net, precision="float32")
    assert choices(analysis.plan(**options)) == choices(alds.analyze(net).plan(**options))


def test_weights_in_float64_are_never_computed_in_float32():
    analysis = alds.analyze(nn.Linear(8, 8).double(), precision="float32")
    assert not analysis.spectra[""].float32


def test_a_model_that_has_changed_is_noticed():
    net = network("low rank")
    analysis = alds.analyze(net, precision="float32")
    with torch.no_grad():
        net[1].weight.mul_(1.001)
    with pytest.raises(errors.ModelError, match="layer '1': its weight has changed since it was analysed"):
        analysis.plan(error=0.3)


def test_precision_is_checked():
    for call in (alds.analyze, lambda m, **o: alds.compress(m, params=0.5, **o)):
        with pytest.raises(errors.ArgumentError, match="precision='half' is neither 'float32' nor 'float64'"):
            call(nn.Linear(8, 8), precision="half")


def test_compress_uses_float32_where_the_plan_can_be_checked(monkeypatch):
    asked = []
    spectra = linalg.spectra
    monkeypatch.setattr(
        linalg, "spectra", lambda *a, float32=False: asked.append(float32) or spectra(*a, float32=float32)
    )
    net = network("flat")
    for options, first in (({"params": 0.5}, True), ({"error": 0.5}, False), ({"params": 0.5, "method": "svd"}, False),
                           ({"params": 0.5, "precision": "float64"}, False)):  # fmt: skip
        asked.clear()
        alds.compress(net, **options)
        assert asked[0] is first


def rows(folder):
    return [row.choice for row in alds.Plan.from_json((folder / "alds_plan.json").read_text()).layers]


@pytest.mark.slow
def test_checkpoints_in_float32_have_the_plan_of_float64(tmp_path, monkeypatch):
    checkpoints.make("llama", tmp_path / "dense")
    told = []
    options = {"params": 0.7, "progress": lambda what, done, total: told.append(what)}
    alds.compress_checkpoint(tmp_path / "dense", tmp_path / "double", precision="float64", **options)
    assert set(told) == {"spectra", "factors", "files"}
    monkeypatch.setattr(float32_check, "SMALL", 1.0)  # everything that is factorised is in doubt
    alds.compress_checkpoint(tmp_path / "dense", tmp_path / "single", **options)
    assert "spectra in doubt" in told
    assert rows(tmp_path / "single") == rows(tmp_path / "double")
    narrow, expected = (tmp_path / name / "alds_plan.json" for name in ("single", "double"))
    errors_of = [[row.error for row in alds.Plan.from_json(p.read_text()).layers] for p in (narrow, expected)]
    assert errors_of[0] == pytest.approx(errors_of[1], rel=1e-12)


@pytest.mark.parametrize("weight", [1e200, 1e-200, 10**30])
def test_importance_of_any_size(weight):
    net = nn.Sequential(*network("falling")[:2])
    options = {"params": 0.5, "importance": {"0": weight, "1": weight}}
    assert choices(alds.analyze(net, precision="float32").plan(**options)) == choices(alds.analyze(net).plan(**options))


def test_the_largest_singular_values_too_are_computed_in_float64_when_asked_for():
    net = nn.Sequential(*network("low rank")[:2])
    narrow, double = alds.analyze(net, groups=(2,), precision="float32"), alds.analyze(net, groups=(2,))
    narrow.plan(params=0.7)  # errors are small: all spectra of slices are in doubt
    plan, expected = (a.plan(params=0.5, criterion="operator") for a in (narrow, double))
    assert [r.error for r in plan.layers] == pytest.approx([r.error for r in expected.layers], rel=1e-12)


def test_a_model_that_has_gone_is_named():
    net = network("flat")
    analysis = alds.analyze(net, precision="float32")
    net.to("meta")
    with pytest.raises(errors.WeightError, match="layer '0'.*meta"):
        analysis.plan(error=0.3)
