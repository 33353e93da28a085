"""Transposed convolutions: the low-rank layer is the dense one of its product, and everything goes with it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import alds_fast as alds
from alds_fast import layers
from alds_fast.criteria.moments.rows import patches
from alds_fast.layers import LowRankLayer, decomposable, find_layers, low_rank_like, oriented_weight
from alds_fast.linalg import Decomposition, distinct_schemes, max_rank
from alds_fast.measurement import dense_flops, flops_of_ranks, layer_inputs

CASES = [
    (nn.ConvTranspose1d, 6, 4, (3,), {}),
    (nn.ConvTranspose1d, 4, 6, (4,), {"stride": 2, "padding": 1, "groups": 2, "bias": False}),
    (nn.ConvTranspose2d, 6, 4, (3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    (nn.ConvTranspose2d, 4, 6, (2, 2), {"stride": 2, "groups": 2}),
    (nn.ConvTranspose2d, 4, 6, (3, 1), {"stride": (1, 2), "dilation": (2, 1), "padding": (3, 0)}),
    (nn.ConvTranspose3d, 4, 3, (2, 3, 1), {"stride": (2, 1, 1), "padding": (0, 1, 0)}),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[4]}")


def dense(case, dtype=torch.float64):
    kind, inputs, outputs, kernel, options = case
    torch.manual_seed(0)
    return kind(inputs, outputs, kernel, **options, dtype=dtype).eval()


def given(module, samples=2, dtype=torch.float64):
    sizes = [3, 4, 5][: len(module.kernel_size)]
    return torch.randn(samples, module.in_channels, *sizes, dtype=dtype, generator=torch.Generator().manual_seed(1))


def forms(module):
    """Every decomposition of a middle and of the full rank."""
    shape = layers.weight_shape(module)
    for scheme in distinct_schemes((0, 1, 2, 3), shape.kernel):
        for slices in (1, 2) if shape.slice_channels % 2 == 0 else (1,):
            full = max_rank(shape, scheme, slices)
            yield from (Decomposition(scheme, slices, rank) for rank in {full, max(1, full // 2)})
            if full > 1:
                for pivots in ("output", "input"):
                    try:
                        yield Decomposition(scheme, slices, 1, pivots).check(shape)
                    except alds.AldsError:
                        continue


@cases
def test_it_is_the_dense_layer_of_its_product(case):
    module, full_ranks = dense(case), 0
    x, cls = given(module), layers.LOW_RANK[type(module)]
    for form in forms(module):
        low = cls.from_dense(module, **form.to_dict())
        same = low.to_dense()
        assert type(same) is type(module) and same.weight.shape == module.weight.shape == low.weight.shape
        torch.testing.assert_close(low(x), same(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(low(x[0]), same(x[0]), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alds.to_plain(low)(x), same(x), rtol=1e-9, atol=1e-9)
        if form.rank == max_rank(low.weight_shape, *form.fold):
            full_ranks += 1
            torch.testing.assert_close(low(x), module(x), rtol=1e-9, atol=1e-9)
    assert full_ranks


def test_output_size_is_taken_as_by_the_dense_layer():
    module = dense(CASES[2])
    for form in forms(module):
        low = layers.LOW_RANK[type(module)].from_dense(module, **form.to_dict())
        for size in ([5, 7], [6, 8]):
            y = low(given(module), output_size=size)
            assert list(y.shape[-2:]) == size
            torch.testing.assert_close(y, low.to_dense()(given(module), output_size=size), rtol=1e-9, atol=1e-9)
            plain = alds.to_plain(low)
            for same in (plain, torch.jit.script(plain)):
                torch.testing.assert_close(same(given(module), output_size=size), y, rtol=1e-9, atol=1e-9)
        assert list(low(given(module)).shape[-2:]) == [6, 8]
    with pytest.raises(ValueError, match="output size"):
        low(given(module), output_size=[9, 9])
    with pytest.raises(ValueError, match="output size"):
        alds.to_plain(low)(given(module), output_size=[9, 9])


@cases
def test_rows_are_what_the_weight_is_multiplied_with(case):
    module = dense(case)
    x = given(module)
    rows, count = patches(module, x)
    weight = oriented_weight(module).unflatten(0, (module.groups, -1)).flatten(2)
    y = torch.einsum("rgn,gfn->rgf", rows, weight).flatten(1)
    wanted = module(x) if module.bias is None else module(x) - module.bias.view(-1, *[1] * len(module.kernel_size))
    torch.testing.assert_close(y, wanted.movedim(1, -1).flatten(0, -2))
    assert count == len(rows) == wanted[:, 0].numel()


@cases
def test_operations_are_those_that_torch_counts(case):
    module = nn.Sequential(dense(case, torch.float32))
    x, layer = given(module[0], dtype=torch.float32), find_layers(module)[0]
    calls = layer_inputs(module, x, ["0"])["0"]
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert dense_flops(layer.module, layer.shape, calls) == counter.get_total_flops()
    for form in forms(module[0]):
        low = low_rank_like(module[0], form).to_empty(device="cpu")
        low.reset_parameters()
        with FlopCounterMode(display=False) as counter:
            low(x)
        ranks = torch.tensor([form.rank]).numpy()
        assert flops_of_ranks(layer.module, layer.shape, calls, form, ranks)[0] == counter.get_total_flops()


def decoder(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 24 * 4), nn.Unflatten(1, (24, 2, 2)), nn.ConvTranspose2d(24, 24, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(24, 16, 3, 2, 1, 1, groups=2), nn.ReLU(), nn.ConvTranspose2d(16, 3, 2, 2),
    ).eval()  # fmt: skip


def codes(samples=40):
    return torch.randn(samples, 8, generator=torch.Generator().manual_seed(3))


BUDGETS = [
    {"params": 0.4},
    {"flops": 0.4, "example_inputs": codes(2)},
    {"params": 0.4, "data": [codes(), codes(7)], "sensitivity": True, "refit": True},
]


@torch.no_grad()
@pytest.mark.parametrize("options", BUDGETS, ids=["params", "flops", "data"])
@pytest.mark.filterwarnings("ignore:.*samples kept aside:UserWarning")
def test_a_decoder_is_compressed_saved_loaded_deployed_and_exported(options, tmp_path):
    model, x = decoder(), codes(3)
    before = copy.deepcopy(model.state_dict())
    small = alds.compress(model, **options)
    low = [m for m in small.modules() if isinstance(m, LowRankLayer) and m.weight_shape.kernel]
    assert low and all(isinstance(m, alds.LowRankConvTranspose2d) for m in low)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    alds.save(small, tmp_path / "small.st")
    assert torch.equal(alds.load(tmp_path / "small.st", decoder(1))(x), small(x))
    fast, table = alds.deploy(small, x, rounds=1, report=True)
    torch.testing.assert_close(fast(x), small(x), rtol=1e-4, atol=1e-5)
    assert any("there is no kernel for transposed" in row.note for row in table.rows)
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), small(x))


def test_their_time_is_measured():
    model = nn.Sequential(dense(CASES[2], torch.float32))
    x = given(model[0], dtype=torch.float32)
    plan = alds.analyze(model, groups=(1,), schemes=(0,)).plan(latency=1.0, example_inputs=x, cache=False)
    assert plan.latency.dense_ms > 0 and plan.latency.compressed_ms > 0


@torch.no_grad()
def test_data_weigh_the_errors():
    """The error that a plan states is that of the layer's output, relative to it."""
    model = nn.Sequential(dense(CASES[2]))
    x = given(model[0], samples=64)
    small = alds.compress(model, params=0.6, data=[x], held_out=0, bias_correction=False, pivots=False)
    row = small.alds_plan.layers[0]
    bias = model[0].bias[:, None, None]
    measured = float((small(x) - model(x)).norm() / (model(x) - bias).norm())
    assert row.criterion is None and row.rank is not None
    assert measured <= 1.02 * row.error and row.error < 1.3 * measured


def test_subclasses_and_reasons():
    class Own(nn.ConvTranspose2d):
        def forward(self, x):
            return super().forward(x) * 2

    kinds = nn.ModuleList([Own(4, 4, 2), dense(CASES[0])])
    assert [layer.name for layer in decomposable(find_layers(kinds))] == ["1"]
    assert find_layers(kinds)[0].reason.startswith("Own is a subclass with a forward of its own; alds_fast.register")
    with pytest.raises(alds.AldsError, match="ConvTranspose2d"):
        alds.LowRankConvTranspose2d.from_dense(nn.Conv2d(4, 4, 2), rank=1)
    with pytest.raises(alds.AldsError, match="there is no kernel for transposed convolutions"):
        low = alds.LowRankConvTranspose2d(4, 4, 2, rank=1)
        low.backend = "fused"
        low(torch.ones(1, 4, 2, 2))
