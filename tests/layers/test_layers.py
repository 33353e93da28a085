"""At full rank a factorised layer equals the dense one for every fold, stride, padding, dilation and grouping."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.marks import slow
from support.models import CONV
from torch import nn

import alds_fast as alds
from alds_fast.errors import ArgumentError, WeightError
from alds_fast.factors import Choice, factorize
from alds_fast.layers import weight_shape
from alds_fast.linalg import Decomposition, folding


@st.composite
def convolutions(draw):
    ndim, g0 = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))

    def axes(strategy):
        return tuple(draw(strategy) for _ in range(ndim))

    padding = draw(st.sampled_from(["same", "valid", None]))
    stride = (1,) * ndim if padding == "same" else axes(st.integers(1, 3))
    module = CONV[ndim](
        g0 * draw(st.sampled_from([1, 2, 4, 6])),
        g0 * draw(st.integers(1, 4)),
        axes(st.integers(1, 4)),
        stride=stride,
        padding=padding or axes(st.integers(0, 2)),
        dilation=axes(st.integers(1, 2)),
        groups=g0,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=torch.float64,
    )
    return module, axes(st.integers(8, 10))


def _all_full_rank(module):
    shape = weight_shape(module)
    for scheme in folding.SCHEMES:
        for groups in folding.divisors(shape.slice_channels):
            rank = folding.max_rank(shape, scheme, groups)
            yield factorize(module, [Choice("", shape, Decomposition(scheme, groups, rank))])[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=150)
@given(convolutions(), st.integers(0, 1000))
def test_full_rank_convolution_equals_dense(problem, seed):
    module, size = problem
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, module.in_channels, *size, dtype=torch.float64, generator=generator)
    expected = module(x)
    for small in _all_full_rank(module):
        torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(small(x[0]), expected[0], rtol=0, atol=1e-9)
        dense = small.to_dense()
        assert type(dense) is type(module) and repr(dense) == repr(module)
        torch.testing.assert_close(dense.weight, module.weight, rtol=0, atol=1e-9)
        torch.testing.assert_close(dense(x), expected, rtol=0, atol=1e-9)


@pytest.mark.slow
@given(st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_full_rank_linear_equals_dense(inputs, outputs, bias):
    module = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 3, inputs, dtype=torch.float64)
    for small in _all_full_rank(module):
        torch.testing.assert_close(small(x), module(x), rtol=0, atol=1e-9)
        torch.testing.assert_close(small(x[0, 0]), module(x[0, 0]), rtol=0, atol=1e-9)
        assert repr(small.to_dense()) == repr(module)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Every instance is another compilation of the same forward; start each test with an empty cache."""
    torch._dynamo.reset()


def _layers():
    yield alds.LowRankLinear(12, 6, 2), (5, 12)
    yield alds.LowRankLinear(12, 6, 2, groups=3, bias=False), (5, 12)
    for scheme in folding.SCHEMES:
        yield alds.LowRankConv1d(4, 6, 3, 2, scheme=scheme, groups=2, padding=1), (2, 4, 9)
        yield alds.LowRankConv2d(4, 6, (3, 2), 1, scheme=scheme, groups=2, padding="same"), (2, 4, 9, 8)
        yield (
            alds.LowRankConv2d(4, 6, 3, 1, scheme=scheme, conv_groups=2, padding=1, padding_mode="circular"),
            (2, 4, 9, 8),
        )
        yield alds.LowRankConv3d(4, 6, 3, 2, scheme=scheme, stride=2), (2, 4, 5, 6, 7)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [slow(*case) if case[0].scheme in (1, 2) else case for case in _layers()],
    ids=lambda v: repr(v)[:60],
)
def test_layer_is_a_good_module(layer, shape):
    """Trains, exports, compiles without graph breaks, survives a change of type, and shows its structure."""
    x = torch.randn(shape)
    y = layer(x)
    y.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in layer.parameters())
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), y)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)
    torch.testing.assert_close(layer.to_dense()(x), y, rtol=1e-4, atol=1e-5)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    for part in ("scheme=", "groups=", "rank="):
        assert part in repr(layer)


@pytest.mark.slow
def test_layer_compiles_with_inductor():
    layer, x = alds.LowRankConv2d(4, 6, 3, 2, groups=2, padding=1), torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.slow
def test_a_whole_model_of_many_layers_compiles_and_exports():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *[nn.Conv2d(16, 16, 3, padding=1) for _ in range(12)])
    small, x = alds.compress(model, params=0.5, p=float("inf")), torch.randn(2, 3, 8, 8)
    assert sum(isinstance(m, alds.LowRankConv2d) for m in small) == 13
    torch.testing.assert_close(torch.compile(small, fullgraph=True, backend="aot_eager")(x), small(x))
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), small(x))


def test_a_low_rank_layer_learns():
    torch.manual_seed(0)
    layer, target = alds.LowRankLinear(8, 8, 2), torch.randn(8, 2) @ torch.randn(2, 8)
    x = torch.randn(256, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(300):
        loss = (layer(x) - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-2 * losses[0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rank": 0}, r"rank=0 is outside 1\.\.6"),
        ({"rank": 7}, r"rank=7 is outside 1\.\.6"),
        ({"rank": 2.0}, r"rank=2\.0 is outside"),
        ({"rank": 1, "groups": 5}, "groups=5 does not divide its 12 channels; allowed: 1, 2, 3, 4, 6, 12"),
        ({"rank": 1, "scheme": 7}, "scheme 7 is not one of"),
    ],
)
def test_impossible_structures_are_refused(kwargs, message):
    with pytest.raises(ArgumentError, match=message):
        alds.LowRankLinear(12, 6, **kwargs)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "foo"},
        {"padding": "same", "stride": 2},
        {"conv_groups": 3},
        {"stride": (1, 1, 1)},
        {"padding_mode": "x"},
    ],
)
def test_what_torch_refuses_for_the_dense_layer_is_refused(options):
    with pytest.raises(ArgumentError, match=r"LowRankConv2d\(4, 6, 3\)"):
        alds.LowRankConv2d(4, 6, 3, 1, **options)


def test_there_is_no_dense_weight_and_the_message_says_what_to_do():
    layer = alds.LowRankLinear(6, 8, 2, dtype=torch.float64)
    uses = (
        lambda w: w.data, lambda w: w.T, lambda w: torch.nn.functional.linear(torch.ones(6).double(), w),
        lambda w: torch.ones(8, 8).double() @ w, lambda w: w.normal_(), lambda w: torch.cat([layer.encoder, w]),
    )  # fmt: skip
    for use in uses:
        with pytest.raises(AttributeError, match="LowRankLinear has no dense weight.*exclude="):
            use(layer.weight)


def test_what_code_asks_of_a_weight_is_told():
    layer = alds.LowRankConv2d(6, 8, (3, 1), 2).to(torch.bfloat16)
    weight = layer.weight
    assert (weight.dtype, weight.device, weight.shape) == (torch.bfloat16, torch.device("cpu"), (8, 6, 3, 1))
    assert (weight.size(), weight.size(2), weight.dim(), weight.ndim, weight.numel()) == ((8, 6, 3, 1), 3, 4, 4, 144)
    assert weight.requires_grad and weight.is_floating_point() and not weight.is_cuda
    assert "weight" not in dict(layer.named_parameters()) and not isinstance(weight, torch.Tensor)

    def forward(x):
        return layer(x.to(layer.weight.dtype))

    x = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(torch.compile(forward, backend="eager", fullgraph=True)(x), forward(x))


@given(convolutions(), st.data())
@settings(max_examples=20)
def test_from_dense_of_a_convolution_is_the_factorised_layer(case, data):
    module, _ = case
    shape = weight_shape(module)
    scheme = data.draw(st.sampled_from(folding.distinct_schemes((0, 1, 2, 3), shape.kernel)))
    groups = data.draw(st.sampled_from(folding.divisors(shape.slice_channels)))
    rank = data.draw(st.integers(1, folding.max_rank(shape, scheme, groups)))
    cls = {1: alds.LowRankConv1d, 2: alds.LowRankConv2d, 3: alds.LowRankConv3d}[len(shape.kernel)]
    layer = cls.from_dense(module, rank=rank, groups=groups, scheme=scheme)
    small, _ = factorize(nn.Sequential(module), [Choice("0", shape, Decomposition(scheme, groups, rank))], exact=True)
    assert str(layer) == str(small[0]) and layer.training == module.training
    torch.testing.assert_close(layer.dense_weight(), small[0].dense_weight(), rtol=1e-4, atol=1e-5)
    assert (layer.bias is None) == (module.bias is None) and (
        layer.bias is None or torch.equal(layer.bias, module.bias)
    )


@pytest.mark.parametrize("groups", [1, 4])
def test_from_dense_of_a_linear_is_the_nearest(groups):
    torch.manual_seed(0)
    linear = nn.Linear(16, 12).double()
    layer = alds.LowRankLinear.from_dense(linear, rank=3, groups=groups)
    assert layer.encoder.dtype == torch.float64 and torch.equal(layer.bias, linear.bias)
    off = layer.dense_weight() - linear.weight
    tails = [torch.linalg.svdvals(part)[3:].square().sum() for part in linear.weight.chunk(groups, 1)]
    torch.testing.assert_close(off.square().sum(), sum(tails))
    full = alds.LowRankLinear.from_dense(linear, rank=4 if groups == 4 else 12, groups=groups)
    torch.testing.assert_close(full.to_dense().weight, linear.weight)


def test_from_dense_refuses():
    with pytest.raises(ArgumentError, match=r"takes an nn\.Linear, got Conv2d"):
        alds.LowRankLinear.from_dense(nn.Conv2d(3, 4, 1), rank=1)
    with pytest.raises(ArgumentError, match=r"takes an nn\.Conv2d, got Conv1d"):
        alds.LowRankConv2d.from_dense(nn.Conv1d(3, 4, 1), rank=1)
    with pytest.raises(ArgumentError, match=r"rank=9 is outside 1\.\.4"):
        alds.LowRankLinear.from_dense(nn.Linear(8, 4), rank=9)
    broken = nn.Linear(8, 4)
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    with pytest.raises(WeightError, match="NaN"):
        alds.LowRankLinear.from_dense(broken, rank=1)
