"""Kernels with int8 factors against float64 of what these stand for: at most twice as far off as plain PyTorch.

Plain PyTorch takes the dequantised factors in the type of x.
"""

import pytest
import torch
from support.kernel_cases import DEVICE, as_int8, linear_case, pivoted_case, ran, random
from support.marks import slow
from support.rounding import error, sequential_rounding

from alds_fast.errors import ArgumentError, BackendError
from alds_fast.kernels import lowrank_linear, lowrank_linears

TYPES = [torch.float32, torch.float16, slow(torch.bfloat16)]
ROWS = [1, 2, 3, 16]
SHAPES = [  # channels, slices, rank, filters
    (64, 1, 16, 64), (48, 4, 3, 17), (75, 1, 20, 90), (96, 2, 24, 33), slow((1024, 1, 16, 16)), slow((300, 3, 70, 40)),
]  # fmt: skip
EPILOGUES = [(None, True, False), ("relu", False, True), ("gelu", True, True), ("silu", False, False)]


def allowed(plain, case):
    x = case["x"]
    if DEVICE == "cpu" or x.dtype != torch.float32:
        return 2 * plain
    return 2 * max(plain, sequential_rounding(case["encoder"][0].numel(), case["decoder"][0].numel()))


def off(case, scales, exact, options):
    """How far the kernel is off, and how far it may be."""
    reference = lowrank_linear(**exact, **options, backend="two-op")
    fused = lowrank_linear(**case, scales=scales, **options, backend="fused")
    plain = lowrank_linear(**case, scales=scales, **options, backend="two-op")
    assert fused.shape == plain.shape and fused.dtype == plain.dtype == case["x"].dtype
    return error(fused, reference), allowed(error(plain, reference), case)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_few_rows(shape, rows, dtype):
    activation, bias, residual = EPILOGUES[(rows + shape[0]) % 4]
    case = linear_case(rows, *shape, dtype, bias, residual)
    found, most = off(*as_int8(case), {"groups": shape[1], "activation": activation})
    assert found <= most


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("rows", [2, 5])
def test_epilogues(rows, epilogue):
    activation, bias, residual = epilogue
    case = linear_case(rows, 32, 2, 5, 24, torch.float16, bias, residual)
    found, most = off(*as_int8(case), {"groups": 2, "activation": activation})
    assert found <= most


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_output_pivots(rows, dtype):
    for channels, rank, filters in ((64, 16, 64), (50, 33, 70)):
        case, order = pivoted_case(rows, channels, rank, filters, dtype, residual=rows > 2)
        found, most = off(*as_int8(case), {"order": order, "activation": "gelu"})
        assert found <= most


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_wrong_scale_is_seen(rows, wrong):
    """The rule of this module fails where one factor's rows have the scales of their neighbours."""
    case, scales, exact = as_int8(linear_case(rows, 64, 1, 16, 64, torch.float16))
    scales[wrong] = scales[wrong].roll(1)
    reference = lowrank_linear(**exact, backend="two-op")
    fused = lowrank_linear(**case, scales=scales, backend="fused")
    assert error(fused, reference) > 20 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layers", [2, 3])
def test_merged_layers(layers, rows, dtype):
    ranks, filters = [20, 3, 33][:layers], [40, 17, 64][:layers]
    tensors = {"encoder": random(sum(ranks), 48, dtype=dtype, scale=48**-0.5)}
    for i, (f, r) in enumerate(zip(filters, ranks, strict=True)):
        tensors[f"decoder{i}"] = random(f, r, dtype=dtype, scale=r**-0.5)
    int8, scales, exact = as_int8(tensors)
    x, biases = random(rows, 48, dtype=dtype), [random(filters[0], dtype=dtype), *[None] * (layers - 1)]

    def call(x, biases, tensors, **options):
        encoder, *decoders = tensors.values()
        return lowrank_linears(x, encoder, decoders, biases, **options)

    exact_biases = [None if b is None else b.double() for b in biases]
    references = call(x.double(), exact_biases, exact, backend="two-op")
    fused, plain = (call(x, biases, int8, scales=scales, backend=b) for b in ("fused", "two-op"))
    for y, p, reference, d in zip(fused, plain, references, list(int8.values())[1:], strict=True):
        assert error(y, reference) <= allowed(error(p, reference), {"x": x, "encoder": int8["encoder"], "decoder": d})
    one, *rest = scales
    wrong = call(x, biases, int8, scales=[one, *(s.roll(1) for s in rest)], backend="fused")
    assert all(error(y, reference) > 1e-3 for y, reference in zip(wrong, references, strict=True))


def test_a_row_of_zeros_has_scale_zero_and_no_nan():
    case = linear_case(3, 32, 1, 8, 24, torch.float16, residual=False)
    case["encoder"][2], case["decoder"][5], case["bias"][5] = 0, 0, 0
    case, scales, _ = as_int8(case)
    assert scales[0][2] == 0 and scales[1][5] == 0
    for backend in ("fused", "two-op"):
        y = lowrank_linear(**case, scales=scales, backend=backend)
        assert torch.isfinite(y).all() and (y[:, 5] == 0).all()


@pytest.mark.parametrize("rows", [16, 17])
def test_the_kernel_reads_integers_up_to_16_rows(rows):
    """More rows take dequantised factors, in the tile kernel where it can run."""
    case, scales, _ = as_int8(linear_case(rows, 32, 1, 8, 24))
    seen = ran(lambda: lowrank_linear(**case, scales=scales, backend="fused"))
    assert "alds_fast.lowrank_linear.default" in seen
    assert ("aten.mul.Tensor" in seen) == (rows > 16)


def test_more_rows_than_the_kernel_takes_say_why():
    case, scales, _ = as_int8(linear_case(17, 300, 1, 260, 300))
    with pytest.raises(BackendError, match="groups \\* rank = 260 is above 256"):
        lowrank_linear(**case, scales=scales, backend="fused")
    first = lowrank_linear(**case, scales=scales, backend="fused-first")
    assert torch.equal(first, lowrank_linear(**case, scales=scales, backend="two-op"))


@pytest.mark.parametrize("backend", ["fused", "two-op"])
@pytest.mark.parametrize("rows", [2, 20])
def test_gradients_go_to_all_but_the_factors(rows, backend):
    case, scales, exact = as_int8(linear_case(rows, 16, 2, 3, 8))
    leaves = {k: case[k].clone().requires_grad_() for k in ("x", "bias", "residual")}
    y = lowrank_linear(**{**case, **leaves}, scales=scales, groups=2, activation="silu", backend=backend)
    y.square().sum().backward()
    wanted = {k: exact[k].clone().requires_grad_() for k in leaves}
    lowrank_linear(**{**exact, **wanted}, groups=2, activation="silu", backend="two-op").square().sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad.double(), wanted[name].grad, rtol=1e-4, atol=1e-5)


def test_gradients_of_merged_layers_go_to_the_input():
    int8, scales, exact = as_int8({"encoder": random(9, 16), "decoder0": random(8, 4), "decoder1": random(6, 5)})
    grads = []
    for x, tensors, options in (
        (random(3, 16), int8, {"scales": scales, "backend": "fused"}),
        (random(3, 16).double(), exact, {"backend": "two-op"}),
    ):
        encoder, *decoders = tensors.values()
        sum(y.square().sum() for y in lowrank_linears(x.requires_grad_(), encoder, decoders, **options)).backward()
        grads.append(x.grad.double())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_autocast_converts_the_scales():
    case, scales, _ = as_int8(linear_case(4, 32, 1, 8, 24))
    with torch.autocast(DEVICE, torch.float16):
        half = lowrank_linear(**case, scales=scales, backend="fused")
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), lowrank_linear(**case, scales=scales), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case, scales: scales.pop(), "scales= are 1 tensors, expected those of the rows of encoder, decoder"),
        (lambda case, scales: case.update(encoder=case["encoder"].float()), "encoder is torch.float32 on"),
        (lambda case, scales: scales.append(scales.pop()[1:]), "the scales of decoder .* have shape .23,."),
        (lambda case, scales: scales.append(scales.pop().half()), "the scales of decoder is torch.float16, x is"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case, scales, _ = as_int8(linear_case(4, 32, 1, 8, 24))
    change(case, scales)
    with pytest.raises(ArgumentError, match=message):
        lowrank_linear(**case, scales=scales)


def test_int8_factors_without_scales_are_refused():
    case, _, _ = as_int8(linear_case(4, 32, 1, 8, 24))
    with pytest.raises(ArgumentError, match="encoder is torch.int8, x is torch.float32"):
        lowrank_linear(**case)


@pytest.mark.slow
def test_opcheck():
    case, scales, _ = as_int8(linear_case(5, 16, 2, 3, 8))
    args = [t.requires_grad_() if t.is_floating_point() else t for t in case.values()]
    torch.library.opcheck(torch.ops.alds_fast.lowrank_linear.default, (*args, 2, "gelu", None, *scales))
    int8, scales, _ = as_int8({"encoder": random(9, 16), "decoder0": random(8, 4), "decoder1": random(6, 5)})
    encoder, *decoders = int8.values()
    merged = (random(3, 16).requires_grad_(), encoder, decoders, [random(8)], [True, False], scales)
    torch.library.opcheck(torch.ops.alds_fast.lowrank_linears.default, merged)
