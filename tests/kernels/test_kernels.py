"""Every kernel against the float64 reference: no further from it than twice what plain PyTorch is in the same type.

On a machine with a GPU the compiled kernels run, elsewhere Triton's interpreter. A compiled float32 product adds its
terms one after the other, where PyTorch's libraries add short sums up: there the rule takes the rounding of sums in
sequence where that is larger.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import alds_fast as alds
from alds_fast.errors import ArgumentError, BackendError
from alds_fast.kernels import backend as chooser
from alds_fast.kernels import (
    decisions,
    limits,
    lowrank_conv2d,
    lowrank_linear,
    lowrank_linears,
    tickets,
    triton_conv2d,
    triton_few_rows,
    triton_linear,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.float16, torch.bfloat16]


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def error(found, reference):
    return float((found.double() - reference).norm() / reference.norm())


def sequential_rounding(*terms):
    """Relative error to expect of float32 sums of so many random terms each, added one after the other.

    The k-th partial sum is about sqrt(k / K) of the last one, and rounding it adds a uniform error of variance
    eps^2 / 12 of its square: sqrt(sum_k eps^2 / 12 * k / K) = eps * sqrt(K / 24), for each product in turn.
    """
    return torch.finfo(torch.float32).eps * (sum(terms) / 24) ** 0.5


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
    found = call(**tensors, **options, backend="fused")
    plain = call(**tensors, **options, backend="two-op")
    assert found.shape == plain.shape and found.dtype == plain.dtype
    assert error(found, reference) <= allowed(error(plain, reference), tensors)


def linear_case(m, c, groups, rank, f, dtype=torch.float32, bias=True, residual=True):
    c_group, q = c // groups, groups * rank
    return {
        "x": random(m, c, dtype=dtype, seed=1),
        "encoder": random(q, c_group, dtype=dtype, seed=2, scale=c_group**-0.5),
        "decoder": random(f, q, dtype=dtype, seed=3, scale=q**-0.5),
        "bias": random(f, dtype=dtype, seed=4) if bias else None,
        "residual": random(m, f, dtype=dtype, seed=5) if residual else None,
    }


LINEAR = [  # rows, channels, groups, rank, filters
    (1, 64, 1, 16, 64), (1, 1, 1, 1, 1), (16, 200, 1, 100, 33), (7, 24, 8, 3, 5), (3, 300, 2, 70, 40),
    (2, 1024, 1, 16, 16), (5, 96, 4, 24, 96), (17, 64, 1, 16, 64), (40, 30, 3, 5, 33), (65, 70, 1, 33, 129),
    (33, 64, 8, 8, 16), (20, 48, 1, 130, 70), (18, 64, 2, 128, 48), (17, 40, 1, 250, 20), (19, 128, 4, 64, 33),
    (130, 16, 1, 1, 17), (2, 2100, 1, 1100, 20), (12, 1024, 2, 16, 48), (1, 20000, 1, 4, 8),
]  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", LINEAR)
def test_lowrank_linear(shape, dtype):
    compare(lowrank_linear, linear_case(*shape, dtype), {"groups": shape[2]})


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [4, 24])
def test_epilogue_of_linear(rows, bias, activation):
    for residual in (True, False):
        case = linear_case(rows, 32, 2, 5, 24, torch.float16, bias, residual)
        compare(lowrank_linear, case, {"groups": 2, "activation": activation})


def conv_case(n, c, size, groups, rank, f, kernels, dtype=torch.float32, bias=True):
    (e, d), q, c_group = kernels, groups * rank, c // groups
    return {
        "x": random(n, c, *size, dtype=dtype, seed=1),
        "encoder": random(q, c_group, *e, dtype=dtype, seed=2, scale=(c_group * e[0] * e[1]) ** -0.5),
        "decoder": random(f, q, *d, dtype=dtype, seed=3, scale=(q * d[0] * d[1]) ** -0.5),
        "bias": random(f, dtype=dtype, seed=4) if bias else None,
    }


def by_one(*kernel):
    return (kernel, (1, 1))


CONV = [  # (n, c, size, groups, rank, f, kernels), options
    ((2, 8, (7, 9), 2, 3, 20, by_one(3, 3)), {"padding": 1}),
    ((1, 32, (8, 8), 1, 20, 33, by_one(3, 3)), {"stride": 2, "padding": 1}),
    ((3, 16, (6, 5), 8, 2, 17, by_one(3, 3)), {"padding": (2, 1), "dilation": (2, 1)}),
    ((1, 3, (11, 12), 1, 5, 16, by_one(7, 7)), {"stride": (2, 3), "padding": 3}),
    ((1, 12, (5, 5), 4, 2, 300, by_one(1, 1)), {}),
    ((2, 12, (5, 6), 1, 1, 9, by_one(1, 1)), {"stride": 2}),
    ((1, 20, (4, 4), 1, 9, 70, by_one(2, 3)), {}),
    ((1, 130, (3, 3), 1, 130, 18, by_one(3, 3)), {"padding": 1}),
    ((4, 4, (1, 1), 2, 1, 8, by_one(1, 1)), {"padding": 1}),
    ((1, 8, (30, 1), 2, 4, 8, by_one(5, 1)), {"padding": (2, 0), "stride": (3, 1)}),
    ((1, 16, (40, 2), 1, 4, 8, by_one(36, 1)), {"padding": (3, 0)}),
    ((9, 64, (1, 1), 2, 32, 64, by_one(3, 3)), {"padding": 1, "dilation": 1}),
    ((2, 32, (9, 7), 2, 16, 48, by_one(3, 3)), {"padding": 1}),
    ((1, 48, (10, 12), 1, 32, 272, by_one(3, 3)), {"padding": 2, "dilation": 2}),
    ((1, 16, (5, 6), 1, 16, 16, by_one(5, 3)), {"padding": (2, 1)}),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape, options", CONV)
def test_lowrank_conv2d(shape, options, dtype):
    compare(lowrank_conv2d, conv_case(*shape, dtype), {"groups": shape[3], **options})


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
@pytest.mark.parametrize("filters", [24, 32, 300])
def test_epilogue_of_conv2d(filters, activation):
    for bias in (True, False):
        case = conv_case(
            2, 32, (5, 5), 2, 16, filters, by_one(1, 1) if filters > 256 else by_one(3, 3), torch.bfloat16, bias
        )
        plain = lowrank_conv2d(**case, groups=2, backend="two-op")
        case["residual"] = random(*plain.shape, dtype=torch.bfloat16, seed=6)
        compare(lowrank_conv2d, case, {"groups": 2, "activation": activation})


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("present", [(0, 2), (2,), ()])
def test_lowrank_linears(layers, dtype, present):
    ranks, filters = [20, 3, 33][:layers], [40, 17, 64][:layers]
    x, encoder = random(5, 48, dtype=dtype), random(sum(ranks), 48, dtype=dtype, scale=48**-0.5)
    decoders = [random(f, r, dtype=dtype, scale=r**-0.5) for f, r in zip(filters, ranks, strict=True)]
    biases = [random(f, dtype=dtype) if i in present else None for i, f in enumerate(filters)]
    found = lowrank_linears(x, encoder, decoders, biases, backend="fused")
    plain = lowrank_linears(x, encoder, decoders, biases, backend="two-op")
    for y, p, d, b, part in zip(found, plain, decoders, biases, encoder.split(ranks), strict=True):
        b64 = None if b is None else b.double()
        reference = lowrank_linear(x.double(), part.double(), d.double(), b64, backend="two-op")
        assert error(y, reference) <= allowed(error(p, reference), {"x": x, "encoder": part, "decoder": d})


# ------------------------------------------------------------------------------------- layouts and edges


def test_tickets_are_left_as_they_were(monkeypatch):
    """Calls that share counters, one after the other, get the same bits: a launch leaves them at 0."""
    counters = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    taken = []
    monkeypatch.setattr(triton_few_rows, "take_tickets", lambda device, count: taken.append(count) or counters)
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
        found, plain = (lowrank_linear(*args, groups=2, backend=b) for b in ("fused", "two-op"))
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


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
        found, plain = (lowrank_linears(*args, backend=b)[0] for b in ("fused", "two-op"))
        torch.testing.assert_close(found, plain)


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
    found = lowrank_linear(**case, activation="relu", backend="fused")
    assert found[3].isnan().all() and torch.isfinite(found[[0, 1, 2, 4, 5, 6]]).all()
    assert not torch.isfinite(found[7]).all()


@pytest.fixture
def poisoned():
    """Memory that torch hands out is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def test_every_output_and_scratch_value_is_written(poisoned):
    assert torch.empty(3).isnan().all()
    for shape in LINEAR:
        assert torch.isfinite(lowrank_linear(**linear_case(*shape), groups=shape[2], backend="fused")).all()
    for shape, options in CONV:
        assert torch.isfinite(lowrank_conv2d(**conv_case(*shape), groups=shape[3], **options, backend="fused")).all()


@pytest.mark.parametrize("shape", LINEAR)
def test_linear_writes_nothing_else(shape):
    m, _, groups, _, f = shape
    case = linear_case(*shape)
    buffer = torch.full((m * f + 2048,), float("nan"), device=DEVICE)
    y = buffer[1024 : 1024 + m * f].view(m, f)
    triton_linear.run_linear(*(case[k] for k in ("x", "encoder", "decoder", "bias", "residual")), groups, None, y)
    assert buffer[:1024].isnan().all() and buffer[1024 + m * f :].isnan().all() and torch.isfinite(y).all()


@pytest.mark.parametrize("shape, options", CONV)
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
    triton_conv2d.run_conv2d(
        *(case[k] for k in ("x", "encoder", "decoder", "bias")), None, shape[3], **both, activation=None, y=y
    )
    assert buffer[:1024].isnan().all() and buffer[1024 + count :].isnan().all() and torch.isfinite(y).all()


def test_inputs_are_not_read_beyond_their_ends():
    """Neighbours in memory are NaN: reading one of them without a mask would show."""
    for shape in LINEAR:
        case = {}
        for name, t in linear_case(*shape).items():
            buffer = torch.full((t.numel() + 512,), float("nan"), device=DEVICE)
            case[name] = buffer[256 : 256 + t.numel()].view(t.shape).copy_(t)
        assert torch.isfinite(lowrank_linear(**case, groups=shape[2], backend="fused")).all()


@pytest.mark.parametrize("shape, options", CONV)
def test_conv2d_does_not_read_beyond_its_input(shape, options, monkeypatch):
    """Every address that the interpreter loads from without a mask lies inside a tensor."""
    if DEVICE == "cuda":
        pytest.skip("compute-sanitizer checks this on a GPU")
    from triton.runtime import interpreter

    case, ranges = conv_case(*shape), []
    case = {k: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for k, v in case.items()}
    for t in case.values():
        ranges.append((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()))
    load, seen = interpreter._interpreter.load, []

    def checked(ptrs, mask, *rest):
        wanted = ptrs[mask].astype("int64")
        inside = sum(((wanted >= begin) & (wanted < end)).astype(int) for begin, end in ranges)
        seen.append(bool((inside == 1).all()))
        return load(ptrs, mask, *rest)

    monkeypatch.setattr(interpreter._interpreter, "load", checked)
    lowrank_conv2d(**case, groups=shape[3], **options, backend="fused")
    assert seen and all(seen)


# ------------------------------------------------------------------------------------- which one runs


class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(func)]
        return func(*args, **(kwargs or {}))


def ran(call):
    with torch.no_grad(), Recorder() as recorder:
        call()
    return recorder.seen


def test_fused_runs_the_kernel_and_nothing_else(monkeypatch):
    launched = []
    for module, name in ((triton_linear, "_lowrank_linear_kernel"), (triton_conv2d, "_conv2d_taps_kernel")):
        kernel = getattr(module, name)
        spy = type("Spy", (), {"__getitem__": lambda self, grid, k=kernel, n=name: launched.append(n) or k[grid]})()
        monkeypatch.setattr(module, name, spy)
    case, image = linear_case(20, 16, 1, 4, 8), conv_case(1, 8, (5, 5), 1, 3, 20, by_one(3, 3))
    assert ran(lambda: lowrank_linear(**case, backend="fused")) == ["alds_fast.lowrank_linear.default"]
    assert ran(lambda: lowrank_conv2d(**image, backend="fused")) == ["alds_fast.lowrank_conv2d.default"]
    assert launched == ["_lowrank_linear_kernel", "_conv2d_taps_kernel"]


def test_two_op_runs_no_kernel():
    case = linear_case(20, 16, 1, 4, 8)
    assert not any("alds_fast" in name for name in ran(lambda: lowrank_linear(**case, backend="two-op")))


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU auto measures")
def test_auto_without_a_gpu_is_two_op():
    case = linear_case(20, 16, 1, 4, 8)
    assert not any("alds_fast" in name for name in ran(lambda: lowrank_linear(**case)))
    assert decisions() == []


def test_auto_takes_the_measured_winner(monkeypatch):
    monkeypatch.setattr(chooser, "_can_measure", lambda x: True)
    monkeypatch.setattr(chooser, "_decisions", {})
    case, times = linear_case(20, 16, 1, 4, 8), iter([2.0, 1.0, 3.0, 5.0])  # two calls are timed first
    monkeypatch.setattr(chooser, "_time_ms", lambda call: next(times))
    assert ran(lambda: lowrank_linear(**case)) == ["alds_fast.lowrank_linear.default"]
    assert ran(lambda: lowrank_linear(**case)) == ["alds_fast.lowrank_linear.default"]  # not measured again
    assert len(decisions()) == 1
    case = linear_case(29, 16, 1, 4, 8)  # rounds up to 32 rows too
    assert ran(lambda: lowrank_linear(**case)) == ["alds_fast.lowrank_linear.default"] and len(decisions()) == 1
    case = linear_case(40, 16, 1, 4, 8)
    assert not any("alds_fast" in name for name in ran(lambda: lowrank_linear(**case)))
    first, second = decisions()
    assert (first["ran"], first["fused_ms"], first["two_op_ms"]) == ("fused", 1.0, 2.0) and second["ran"] == "two-op"


def test_a_kernel_that_the_device_refuses_has_lost(monkeypatch):
    monkeypatch.setattr(chooser, "_can_measure", lambda x: True)
    monkeypatch.setattr(chooser, "_decisions", {})

    def time_ms(call):
        if "fused" in call.__qualname__:
            raise RuntimeError("out of resource: shared memory")
        return 1.0

    monkeypatch.setattr(chooser, "_time_ms", time_ms)
    case = linear_case(20, 16, 1, 4, 8)
    assert not any("alds_fast" in name for name in ran(lambda: lowrank_linear(**case)))
    assert decisions()[0]["ran"] == "two-op" and "shared memory" in decisions()[0]["note"]


def test_fused_first_runs_two_calls_where_the_kernel_cannot():
    case = linear_case(20, 16, 1, 4, 8)
    assert ran(lambda: lowrank_linear(**case, backend="fused-first")) == ["alds_fast.lowrank_linear.default"]
    large = linear_case(17, 16, 1, 260, 8)
    assert not any("alds_fast" in name for name in ran(lambda: lowrank_linear(**large, backend="fused-first")))


def test_forward_mode_and_functorch_do_not_meet_the_kernel():
    case = linear_case(20, 16, 1, 4, 8, residual=False)
    x, rest = case.pop("x"), case

    def call(backend):
        return torch.func.jvp(lambda a: lowrank_linear(a, **rest, backend=backend), (x,), (x,))[1]

    torch.testing.assert_close(call("fused-first"), call("two-op"))
    assert float(call("two-op").norm()) > 0
    with pytest.raises(BackendError, match="forward-mode"):
        call("fused")


def test_fused_says_why_it_cannot_run(monkeypatch):
    case = linear_case(20, 16, 1, 4, 8)
    with pytest.raises(BackendError, match="float64"):
        lowrank_linear(**{k: v.double() for k, v in case.items()}, backend="fused")
    with pytest.raises(BackendError, match=r"groups \* rank = 260 is above 256 with more than 16 rows"):
        lowrank_linear(**linear_case(17, 16, 1, 260, 8), backend="fused")
    for kernels in (((1, 3), (3, 1)), ((1, 1), (3, 3))):
        with pytest.raises(BackendError, match="schemes 1, 2 and 3 run as two calls"):
            lowrank_conv2d(**conv_case(1, 8, (5, 5), 1, 3, 20, kernels), backend="fused")
    with pytest.raises(BackendError, match="up to 16 rows"):
        lowrank_linears(case["x"], case["encoder"], [case["decoder"]], backend="fused")
    with pytest.raises(BackendError, match="up to 3 layers are merged, got 4"):
        lowrank_linears(case["x"][:2], case["encoder"], [random(8, 1)] * 4, backend="fused")
    monkeypatch.setattr(chooser, "HAS_TRITON", False)
    with pytest.raises(BackendError, match="triton is not installed"):
        lowrank_linear(**case, backend="fused")
    assert lowrank_linear(**case).shape == (20, 8)


def test_fused_on_the_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(chooser, "_interpreted", lambda: False)
    case = {k: v.cpu() for k, v in linear_case(20, 16, 1, 4, 8).items()}
    with pytest.raises(BackendError, match="it runs on CUDA devices, x is on the CPU"):
        lowrank_linear(**case, backend="fused")


# ------------------------------------------------------------------------------------------ bad input


def _with(**changes):
    return linear_case(4, 16, 2, 3, 8) | changes


@pytest.mark.parametrize(
    "case, options, message",
    [
        (_with(x=random(4, 15)), {}, "x (4, 15) has 15 channels, encoder (6, 8) with groups=2 takes 16"),
        (_with(x=random(4, 16).half()), {}, "encoder is torch.float32, x is torch.float16"),
        (_with(bias=random(7)), {}, "bias has shape (7,), decoder (8, 6) needs (8,)"),
        (_with(residual=random(4, 7)), {}, "residual has shape (4, 7), the output (4, 8)"),
        (_with(decoder=random(8, 5)), {}, "decoder (8, 5) takes 5 hidden values, the encoder gives 6"),
        (_with(encoder=random(6, 8, 1)), {}, "encoder has shape (6, 8, 1), expected 2 dimensions"),
        (_with(), {"groups": 4}, "groups=4 does not divide the 6 rows of encoder (6, 8)"),
        (_with(), {"groups": 0}, "groups=0 does not divide"),
        (_with(), {"activation": "tanh"}, "activation='tanh' is not None or one of relu, silu, gelu"),
        (_with(), {"backend": "fast"}, "backend='fast' is not one of auto, fused, fused-first, two-op"),
        (_with(encoder=torch.empty(6, 8, device="meta")), {}, "encoder is on meta, x on"),
        (_with(x=torch.tensor(1.0)), {}, "x has no dimensions"),
        (_with(encoder=random(6, 0), x=random(4, 0)), {}, "must not be empty"),
    ],
)
def test_bad_input_of_linear(case, options, message):
    for backend in ("fused", "two-op"):
        with pytest.raises(ArgumentError) as raised:
            lowrank_linear(**case, **({"groups": 2, "backend": backend} | options))
        assert message in str(raised.value)


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((1, 8, (5, 5), 1, 3, 20, by_one(7, 7)), {}, "x (1, 8, 5, 5) is smaller than the kernel [7, 7]"),
        ((1, 8, (5, 5), 1, 3, 20, by_one(3, 3)), {"stride": 0}, "stride=0: expected an integer >= 1"),
        ((1, 8, (5, 5), 1, 3, 20, by_one(3, 3)), {"padding": (1, -1)}, "padding=(1, -1)"),
        ((1, 8, (5, 5), 1, 3, 20, by_one(3, 3)), {"dilation": (1, 1, 1)}, "dilation=(1, 1, 1)"),
        ((1, 8, (5, 5), 1, 3, 20, ((3, 3), (3, 1))), {}, "both have a kernel along axis 0"),
        ((1, 8, (5, 5), 1, 3, 20, by_one(3, 3)), {"groups": 3}, "x (1, 8, 5, 5) has 8 channels"),
    ],
)
def test_bad_input_of_conv2d(shape, options, message):
    for backend in ("fused", "two-op"):
        with pytest.raises(ArgumentError) as raised:
            lowrank_conv2d(**conv_case(*shape), **({"backend": backend} | options))
        assert message in str(raised.value)


def test_wrong_type_and_device_of_the_operators():
    with pytest.raises(ArgumentError, match="3 dimensions|expected 4 dimensions"):
        lowrank_conv2d(random(8, 5, 5), random(3, 8, 3, 3), random(20, 3, 1, 1))
    with pytest.raises(ArgumentError, match="do not fit encoder"):
        lowrank_linears(random(2, 8), random(3, 8), [random(4, 2)])


def test_tf32_follows_torch():
    assert limits.precision() == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert limits.precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # the newer way to ask for it
    try:
        assert limits.precision() == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def test_the_layers_call_them():
    layer = alds.LowRankLinear(16, 8, 4).to(DEVICE)
    conv = alds.LowRankConv2d(8, 20, 3, 3, padding=1).to(DEVICE)
    layer.backend = conv.backend = "fused"
    x, image = random(4, 16), random(1, 8, 5, 5)
    assert ran(lambda: layer(x)) == ["alds_fast.lowrank_linear.default"]
    assert ran(lambda: conv(image)) == ["alds_fast.lowrank_conv2d.default"]
    assert "backend='fused'" in str(layer)
