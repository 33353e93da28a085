"""Low-rank layers are cut further: best of their rank, with errors against the layer as it is."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import alds_fast as alds
from alds_fast import linalg
from alds_fast.criteria import layer_spectra
from alds_fast.layers import LowRankLayer, count_params, decomposable, find_layers


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, groups=2, stride=2), nn.ReLU(),
        nn.ConvTranspose2d(32, 24, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
        nn.Linear(216, 48), nn.ReLU(), nn.Linear(48, 40),
    ).eval()  # fmt: skip


def images(count=50):
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(1))


LOW = [
    alds.LowRankLinear(24, 18, rank=5, groups=2),
    alds.LowRankLinear(24, 18, rank=7, pivots="output"),
    alds.LowRankLinear(24, 12, rank=4, groups=3, pivots="input"),
    alds.LowRankConv2d(12, 10, 3, rank=6, scheme=1),
    alds.LowRankConv2d(12, 10, 3, rank=3, scheme=3, groups=2, conv_groups=2),
    alds.LowRankConvTranspose2d(12, 10, 3, rank=6, scheme=2, stride=2),
]


@torch.no_grad()
@pytest.mark.parametrize("layer", LOW, ids=str)
def test_spectra_are_those_of_the_product(layer):
    layer = copy.deepcopy(layer).double()
    model = nn.Sequential(layer)
    (spectra,) = layer_spectra(decomposable(find_layers(model)), (0,), (1,))
    shape = layer.weight_shape
    matrix = linalg.folding.fold(layer.dense_weight(), shape, layer.scheme)
    (values,) = linalg.spectra([matrix], [[layer.slices, 1]])
    key = layer.decomposition.fold
    assert set(spectra.values) == {key} and spectra.values[key].shape[-1] == layer.rank
    torch.testing.assert_close(spectra.values[key], values[0][..., : layer.rank], rtol=1e-6, atol=1e-7)
    assert spectra.top[layer.scheme] == pytest.approx(float(values[1].max()), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("layer", LOW, ids=str)
def test_the_cut_layer_is_the_best_of_its_rank(layer):
    layer = copy.deepcopy(layer).double()
    stored = count_params(layer)
    plan = alds.analyze(nn.Sequential(layer)).plan(params=0.8)
    row = plan.layers[0]
    assert row.params_before == stored and row.rank < layer.rank
    small = plan.apply(nn.Sequential(layer))
    assert count_params(small) == plan.params == row.params_after <= 0.8 * stored
    weight, cut = layer.dense_weight(), small[0].dense_weight()
    assert float((cut - weight).norm() / weight.norm()) == pytest.approx(row.error, rel=1e-6)
    assert small.alds_factors["0"].error == pytest.approx(row.error, rel=1e-6)
    best = type(layer).from_dense(layer.to_dense(), rank=row.rank, groups=layer.slices, scheme=layer.scheme)
    torch.testing.assert_close(cut, best.dense_weight(), rtol=1e-6, atol=1e-8)
    again = alds.Plan.from_json(plan.to_json()).apply(nn.Sequential(layer))
    torch.testing.assert_close(again[0].dense_weight(), cut)


OPTIONS = [
    {"params": 0.5},
    {"flops": 0.6, "example_inputs": images(2)},
    {"error": 0.3},
    {"params": 0.8, "data": [images()], "sensitivity": True, "refit": True, "include": ["0", "2", "10"]},
]


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=["params", "flops", "error", "data"])
@pytest.mark.filterwarnings("ignore:.*(kept aside|refit= left):UserWarning")
def test_a_compressed_model_is_compressed_saved_and_loaded(options, tmp_path):
    dense, x = net(), images(2)
    once = alds.compress(dense, params=0.6)
    before = copy.deepcopy(once.state_dict())
    twice = alds.compress(once, **options)
    assert all(torch.equal(value, before[name]) for name, value in once.state_dict().items())
    ranks = [{n: m.rank for n, m in net.named_modules() if isinstance(m, LowRankLayer)} for net in (once, twice)]
    assert all(ranks[1][name] <= rank for name, rank in ranks[0].items()) and ranks[0] != ranks[1]
    assert count_params(twice) == twice.alds_plan.params
    if "params" in options:
        assert count_params(twice) <= options["params"] * count_params(once)
    if "flops" in options:
        counts = []
        for model in (once, twice):
            with FlopCounterMode(display=False) as counter:
                model(x)
            counts.append(counter.get_total_flops())
        assert 0.55 * counts[0] < counts[1] <= 0.6 * counts[0]
    alds.save(twice, tmp_path / "twice.st")
    for model in (net(1), once):
        assert torch.equal(alds.load(tmp_path / "twice.st", model)(x), twice(x))


def test_nothing_is_left_to_cut_from_a_layer_that_is_shared():
    layer = alds.LowRankLinear(16, 16, rank=6)
    other = alds.LowRankLinear(16, 16, rank=6)
    other.decoder = layer.decoder
    model = nn.Sequential(layer, other, alds.LowRankLinear(16, 16, rank=6))
    reasons = [found.reason for found in find_layers(model)]
    assert "shared" in reasons[0] and "shared" in reasons[1] and reasons[2] is None
    with pytest.raises(alds.AldsError, match="not analysed for layer"):
        alds.analyze(nn.Sequential(alds.LowRankLinear(16, 16, rank=3, groups=2))).plan(params=0.7, method="svd")
    broken = alds.LowRankLinear(16, 16, rank=6)
    broken.encoder.data[0, 0] = torch.nan
    with pytest.raises(alds.AldsError, match="NaN"):
        alds.analyze(broken)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_types_are_known_again(dtype, tmp_path, recwarn):
    """Their dense weight is rounded, their spectra are not."""
    for seed in range(3):
        torch.manual_seed(seed)
        low = alds.compress(nn.Sequential(nn.Linear(64, 64)).to(dtype), params=0.6)
        analysis = alds.analyze(low)
        analysis.plan(params=0.5).apply(low)
        alds.save_analysis(analysis, tmp_path / "a.safetensors")
        alds.load_analysis(tmp_path / "a.safetensors", low)
        assert not [w for w in recwarn if "has changed" in str(w.message)]
        low[0].decoder.data.mul_(1.05)
        with pytest.warns(UserWarning, match="has changed"):
            analysis.plan(params=0.5).apply(low)
        recwarn.clear()
