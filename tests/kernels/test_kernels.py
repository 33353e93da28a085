"""Every kernel against the float64 reference: no further from it than twice what plain PyTorch is in the same type.

On a machine with a GPU the compiled kernels run, elsewhere Triton's interpreter. A compiled float32 product adds its
terms one after the other, where PyTorch's libraries add short sums up: there the rule takes the rounding of sums in
sequence where that is larger.
"""

import pytest
import torch
from support.interpreter import watched_loads
from support.kernel_cases import (
    CONV,
    DEVICE,
    EACH_CONV,
    EACH_LINEAR,
    LINEAR,
    PIVOTED,
    by_one,
    conv_case,
    linear_case,
    pivoted_case,
    random,
)
from support.marks import slow
from support.rounding import error, sequential_rounding

from alds_fast.kernels import (
    lowrank_conv2d,
    lowrank_linear,
    lowrank_linears,
    pivot_table,
)
from alds_fast.kernels.fused import conv2d, few_rows, launching, linear, tickets

TYPES = [torch.float32, slow(torch.float16), torch.bfloat16]


def allowed(plain, case):
    """How far off the kernel may be, by how far off plain PyTorch is."""
    x, encoder, decoder = (case[k] for k in ("x", "encoder", "decoder"))
    if DEVICE == "cpu" or x.dtype != torch.float32:
        return 2 * plain
    return 2 * max(plain, sequential_rounding(encoder[0].numel(), decoder[0].numel()))


def compare(call, tensors, options):
    """The rule of this module, for a call of (tensors, options, backend=)."""
    exact = {k: t if t is None else t.double() for k, t in tensors.items()}
    reference = call(**exact, **options, backend="two-op")
    fused = call(**tensors, **options, backend="fused")
    plain = call(**tensors, **options, backend="two-op")
    assert fused.shape == plain.shape and fused.dtype == plain.dtype
    assert error(fused, reference) <= allowed(error(plain, reference), tensors)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", EACH_LINEAR)
def test_lowrank_linear(shape, dtype):
    compare(lowrank_linear, linear_case(*shape, dtype), {"groups": shape[2]})


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [4, 24])
def test_epilogue_of_linear(rows, bias, activation):
    for residual in (True, False):
        case = linear_case(rows, 32, 2, 5, 24, torch.float16, bias, residual)
        compare(lowrank_linear, case, {"groups": 2, "activation": activation})


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", PIVOTED)
def test_output_pivots_are_stored_in_place(shape, dtype):
    for bias, activation in ((True, None), (False, "relu"), (True, "gelu")):
        case, order = pivoted_case(*shape, dtype, bias=bias, residual=activation == "gelu")
        compare(lowrank_linear, case, {"order": order, "activation": activation})


def test_output_pivots_are_those_of_the_layer_with_the_identity():
    case, order = pivoted_case(20, 48, 9, 40, bias=True, residual=False)
    whole = torch.cat([torch.eye(9, device=DEVICE), case["decoder"]])[order]
    y = lowrank_linear(**case, order=order, backend="fused")
    torch.testing.assert_close(y, lowrank_linear(**{**case, "decoder": whole}, backend="two-op"))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape, options", EACH_CONV)
def test_lowrank_conv2d(shape, options, dtype):
    compare(lowrank_conv2d, conv_case(*shape, dtype), {"groups": shape[3], **options})


class Watched:
    """A kernel whose launches leave their SIZE in a list."""

    def __init__(self, kernel, taken):
        self.kernel, self.taken = kernel, taken

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.taken.append(options["SIZE"])
            return self.kernel[grid](*args, **options)

        return launch


@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (2, 2)])
def test_the_first_size_of_images_is_a_constant(kernel, monkeypatch):
    """Of a layer; other sizes are right with the kernel that takes any, in whatever order they come."""
    monkeypatch.setattr(conv2d, "_first_sizes", {})
    monkeypatch.setattr(launching, "is_on_device", lambda tensors: False)  # all launches are seen
    taken = []
    for name in ("_conv2d_taps_kernel", "conv2d_rows_kernel"):
        monkeypatch.setattr(conv2d, name, Watched(getattr(conv2d, name), taken))
    padding = tuple(k // 2 for k in kernel)
    for size in ((5, 6), (4, 9), (5, 6), (6, 5)):
        case = conv_case(2, 16, size, 1, 16, 32, by_one(*kernel), torch.float16)
        compare(lowrank_conv2d, case, {"padding": padding})
    out = tuple(n + 2 * p - k + 1 for n, p, k in zip((5, 6), padding, kernel, strict=True))
    first = (5, 6) if kernel[1] > 2 else (5, 6, *out)
    assert set(taken[:1]) == {first} and taken.count(first) == 2 and taken.count(()) == 2


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
@pytest.mark.parametrize("filters", [24, slow(32), 300])
def test_epilogue_of_conv2d(filters, activation):
    for bias in (True, False):
        case = conv_case(
            2, 32, (5, 5), 2, 16, filters, by_one(1, 1) if filters > 256 else by_one(3, 3), torch.bfloat16, bias
        )
        plain = lowrank_conv2d(**case, groups=2, backend="two-op")
        case["residual"] = random(*plain.shape, dtype=torch.bfloat16, seed=6)
        compare(lowrank_conv2d, case, {"groups": 2, "activation": activation})


@pytest.mark.parametrize("layers", [1, slow(2), 3])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("present", [(0, 2), (2,), ()])
def test_lowrank_linears(layers, dtype, present):
    ranks, filters = [20, 3, 33][:layers], [40, 17, 64][:layers]
    x, encoder = random(5, 48, dtype=dtype), random(sum(ranks), 48, dtype=dtype, scale=48**-0.5)
    decoders = [random(f, r, dtype=dtype, scale=r**-0.5) for f, r in zip(filters, ranks, strict=True)]
    biases = [random(f, dtype=dtype) if i in present else None for i, f in enumerate(filters)]
    fused = lowrank_linears(x, encoder, decoders, biases, backend="fused")
    plain = lowrank_linears(x, encoder, decoders, biases, backend="two-op")
    for y, p, d, b, part in zip(fused, plain, decoders, biases, encoder.split(ranks), strict=True):
        b64 = None if b is None else b.double()
        reference = lowrank_linear(x.double(), part.double(), d.double(), b64, backend="two-op")
        assert error(y, reference) <= allowed(error(p, reference), {"x": x, "encoder": part, "decoder": d})


# ------------------------------------------------------------------------------------- layouts and edges


def test_tickets_are_left_as_they_were(monkeypatch):
    """Calls that share counters, one after the other, get the same bits: a launch leaves them at 0."""
    counters = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    taken = []
    monkeypatch.setattr(few_rows, "take_tickets", lambda device, count: taken.append(count) or counters)
    case = linear_case(5, 1024, 2, 20, 16, torch.float16)
    first, second = (lowrank_linear(**case, groups=2, backend="fused") for _ in range(2))
    assert torch.equal(first, second) and taken == [4, 4] and not counters.any()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_graphs_and_streams_have_counters_of_their_own():
    eager, other = tickets.take_tickets(torch.device("cuda", 0), 8), None
    with torch.cuda.stream(torch.cuda.Stream()):
        other = tickets.take_tickets(torch.device("cuda", 0), 8)
    captured = []
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        captured += [tickets.take_tickets(torch.device("cuda", 0), 8) for _ in range(2)]
    assert len({t.data_ptr() for t in (eager, other, *captured)}) == 4


@pytest.mark.parametrize("rows", [3, 20])
def test_any_strides_and_leading_shape(rows):
    case = linear_case(rows * 2, 32, 2, 4, 24, residual=False)
    wide = random(2, rows, 64)[..., ::2]
    views = [wide, random(2, 32, rows).mT, random(1, 1, 32).expand(2, rows, 32), random(32)]
    for x in views:
        args = (x, case["encoder"], case["decoder"], case["bias"])
        fused, plain = (lowrank_linear(*args, groups=2, backend=b) for b in ("fused", "two-op"))
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_non_contiguous_factors_and_residual():
    case = linear_case(20, 32, 1, 8, 24)
    twisted = {k: v if v.dim() < 2 else v.mT.contiguous().mT for k, v in case.items()}
    compare(lowrank_linear, twisted, {})
    assert torch.equal(lowrank_linear(**twisted, backend="fused"), lowrank_linear(**case, backend="fused"))


@pytest.mark.parametrize("rows", [3, 20])
def test_strided_bias(rows):
    case = linear_case(rows, 32, 1, 8, 24)
    case["bias"] = random(48)[::2]
    compare(lowrank_linear, case, {})
    case["bias"] = random(1).expand(24)
    compare(lowrank_linear, case, {})
    image = conv_case(1, 8, (5, 5), 1, 3, 20, by_one(3, 3)) | {"bias": random(40)[::2]}
    compare(lowrank_conv2d, image, {})
    args = case["x"], case["encoder"], [case["decoder"]], [random(48)[::2]]
    if rows <= 16:
        fused, plain = (lowrank_linears(*args, backend=b)[0] for b in ("fused", "two-op"))
        torch.testing.assert_close(fused, plain)


def test_memory_format_does_not_change_a_bit():
    case = conv_case(2, 8, (5, 6), 2, 3, 20, by_one(3, 3))
    last = {k: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for k, v in case.items()}
    first, second = (lowrank_conv2d(**c, groups=2, backend="fused") for c in (case, last))
    assert torch.equal(first, second) and second.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["fused", "two-op"])
def test_zero_rows(backend):
    case = linear_case(0, 16, 1, 4, 8)
    assert lowrank_linear(**case, backend=backend).shape == (0, 8)
    image = conv_case(0, 8, (5, 5), 1, 3, 20, by_one(3, 3))
    assert lowrank_conv2d(**image, backend=backend).shape == (0, 20, 3, 3)
    ys = lowrank_linears(case["x"], case["encoder"], [case["decoder"]], backend=backend)
    assert [y.shape for y in ys] == [(0, 8)]


def test_nan_and_infinity_pass_through():
    case = linear_case(20, 16, 1, 4, 8, residual=False)
    case["x"][3, 5], case["x"][7, 0] = float("nan"), float("inf")
    fused = lowrank_linear(**case, activation="relu", backend="fused")
    assert fused[3].isnan().all() and torch.isfinite(fused[[0, 1, 2, 4, 5, 6]]).all()
    assert not torch.isfinite(fused[7]).all()


@pytest.fixture
def poisoned():
    """Memory that torch hands out is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_every_output_and_scratch_value_is_written(poisoned):
    assert torch.empty(3).isnan().all()
    for shape in LINEAR:
        assert torch.isfinite(lowrank_linear(**linear_case(*shape), groups=shape[2], backend="fused")).all()
    for shape in PIVOTED:
        case, order = pivoted_case(*shape)
        assert torch.isfinite(lowrank_linear(**case, order=order, backend="fused")).all()
    for shape, options in CONV:
        assert torch.isfinite(lowrank_conv2d(**conv_case(*shape), groups=shape[3], **options, backend="fused")).all()


def written_around(case, groups, outputs, rows, columns):
    """y, of so many rows and columns, in the midst of NaN that stays."""
    buffer = torch.full((rows * columns + 2048,), float("nan"), device=DEVICE)
    y = buffer[1024 : 1024 + rows * columns].view(rows, columns)
    tensors = [case[k] for k in ("x", "encoder", "decoder", "bias", "residual")]
    linear.plan_linear(*tensors, groups, None, outputs)(*tensors, outputs, (), y)
    assert buffer[:1024].isnan().all() and buffer[1024 + rows * columns :].isnan().all()
    return y


@pytest.mark.parametrize("shape", EACH_LINEAR)
def test_linear_writes_nothing_else(shape):
    assert torch.isfinite(written_around(linear_case(*shape), shape[2], None, shape[0], shape[4])).all()


@pytest.mark.parametrize("shape", PIVOTED)
def test_output_pivots_write_nothing_else(shape):
    """Whatever the table holds."""
    case, order = pivoted_case(*shape)
    tables = pivot_table.outputs_of(order), pivot_table.outputs_of(torch.zeros_like(order))
    whole, _ = (written_around(case, 1, table, shape[0], shape[3]) for table in tables)
    assert torch.isfinite(whole).all()


@pytest.mark.parametrize("shape, options", EACH_CONV)
def test_conv2d_writes_nothing_else(shape, options):
    case = conv_case(*shape)
    n, f, oh, ow = lowrank_conv2d(**case, groups=shape[3], **options, backend="two-op").shape
    count = n * f * oh * ow
    buffer = torch.full((count + 2048,), float("nan"), device=DEVICE)
    y = buffer[1024 : 1024 + count].view(n, oh, ow, f).permute(0, 3, 1, 2)
    both = {
        k: v if isinstance(v, tuple) else (v, v)
        for k, v in ({"stride": 1, "padding": 0, "dilation": 1} | options).items()
    }
    last = torch.channels_last
    x, encoder, decoder = (case[k].contiguous(memory_format=last) for k in ("x", "encoder", "decoder"))
    tensors = x, encoder, decoder, case["bias"], None
    conv2d.plan_conv2d(*tensors, shape[3], **both, activation=None, size=(oh, ow))(*tensors, y)
    assert buffer[:1024].isnan().all() and buffer[1024 + count :].isnan().all() and torch.isfinite(y).all()


@pytest.mark.slow
def test_inputs_are_not_read_beyond_their_ends():
    """Neighbours in memory are NaN: reading one of them without a mask would show."""
    for shape in LINEAR:
        case = {}
        for name, t in linear_case(*shape).items():
            buffer = torch.full((t.numel() + 512,), float("nan"), device=DEVICE)
            case[name] = buffer[256 : 256 + t.numel()].view(t.shape).copy_(t)
        assert torch.isfinite(lowrank_linear(**case, groups=shape[2], backend="fused")).all()


@pytest.mark.parametrize("shape, options", EACH_CONV)
def test_conv2d_does_not_read_beyond_its_input(shape, options, monkeypatch):
    """Every address that the interpreter loads from without a mask lies inside a tensor."""
    if DEVICE == "cuda":
        pytest.skip("compute-sanitizer checks this on a GPU")
    case = conv_case(*shape)
    case = {k: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for k, v in case.items()}
    seen = watched_loads(monkeypatch, case.values())
    lowrank_conv2d(**case, groups=shape[3], **options, backend="fused")
    assert seen and all(seen)
