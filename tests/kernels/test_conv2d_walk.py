"""Scheme 3 by a walk down the image: no further from float64 than twice what plain PyTorch is in the same type."""

from types import SimpleNamespace

import pytest
import torch
from support.interpreter import watched_loads
from support.kernel_cases import DEVICE, WALK, conv_case, ran, random, walk_case
from support.rounding import error

import alds_fast as alds
from alds_fast.errors import BackendError
from alds_fast.kernels import ConvKey, Tiling, backend, calls, lowrank_conv2d, using
from alds_fast.kernels.fused import conv2d_walk, launching

HALVES = [torch.float16, torch.bfloat16]
SAME = {"padding": 1}


def compare(case, **options):
    """The rule of this module; the fused result."""
    options = SAME | options
    exact = {k: t if t is None else t.double() for k, t in case.items()}
    reference = lowrank_conv2d(**exact, **options, backend="two-op")
    fused = lowrank_conv2d(**case, **options, backend="fused")
    plain = lowrank_conv2d(**case, **options, backend="two-op")
    assert fused.shape == plain.shape and fused.dtype == plain.dtype
    assert fused.is_contiguous(memory_format=torch.channels_last)
    assert error(fused, reference) <= 2 * error(plain, reference)
    return fused


@pytest.fixture
def launched(monkeypatch):
    """The constants of every launch; nothing is known before."""
    monkeypatch.setattr(conv2d_walk, "_first_seen", {})
    monkeypatch.setattr(calls, "_known", {})
    monkeypatch.setattr(launching, "is_on_device", lambda tensors: False)  # all launches are seen
    constants, kernel = [], conv2d_walk.conv2d_walk_kernel

    class Watched:
        def __getitem__(self, grid):
            return lambda *args, **options: (constants.append(options), kernel[grid](*args, **options))

    monkeypatch.setattr(conv2d_walk, "conv2d_walk_kernel", Watched())
    return constants


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", WALK)
def test_values(shape, dtype):
    compare(walk_case(*shape, dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("wgmma", [True, False])
def test_tiles_of_either_device(wgmma, dtype, monkeypatch, launched):
    monkeypatch.setattr(conv2d_walk, "has_wgmma", lambda x: wgmma)
    for rank, activation, cols in ((32, None, 32), (16, "gelu", 32), (16, "relu", 64)):
        compare(walk_case(2, 48, (9, 6), rank, 64, dtype), activation=activation)
        assert launched.pop()["BF"] == (64 if wgmma else cols) and not launched


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
def test_epilogues(activation):
    for bias in (True, False):
        for residual in (True, False):
            case = walk_case(2, 16, (5, 33), 16, 32, torch.float16, bias)
            if residual:
                case["residual"] = random(2, 32, 5, 33, dtype=torch.float16, seed=6)
            compare(case, activation=activation)


def test_every_tap_has_its_place():
    """One tap of the decoder at a time, so that none can stand in for another."""
    case = walk_case(1, 16, (4, 5), 16, 16, torch.float16, bias=False)
    for tap in range(9):
        one = torch.zeros_like(case["decoder"])
        one[:, :, tap // 3, tap % 3] = case["decoder"][:, :, tap // 3, tap % 3]
        compare(case | {"decoder": one})


@pytest.mark.parametrize("parts", [1, 2, 3, 16])
def test_strips_of_an_image(parts, launched):
    """More strips than rows too, whose programs have nothing to do."""
    case = walk_case(3, 16, (5, 4), 16, 16, torch.float16)
    key = ConvKey(torch.float16, 64, 16, 16, 16, 1, (5, 4), (3, 3), (1, 1), (1, 1), (1, 1), True, False, None,
                  True, "ieee", 3)  # fmt: skip
    with using(torch.device(DEVICE), {key: Tiling(64, 16, 16, 4, 2, parts)}):
        tiled = compare(case)
    assert launched[0]["PARTS"] == parts and launched[0]["BF"] == 16 and torch.equal(tiled, compare(case))


def test_strides_and_alignment_do_not_change_a_bit():
    case = walk_case(2, 16, (5, 6), 16, 32, torch.float16)
    other = {k: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for k, t in case.items()}
    last = {k: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for k, t in case.items()}
    first, second, third = (compare(c) for c in (case, other, last))
    assert torch.equal(first, second) and torch.equal(first, third)


def test_the_first_size_of_images_is_a_constant(launched):
    """Of a layer; other sizes share a kernel that takes any of as many columns, and are right."""
    for size in ((5, 6), (4, 7), (5, 6), (6, 8)):
        compare(walk_case(2, 16, size, 16, 32, torch.float16))
    assert [constants["SIZE"] for constants in launched] == [(5, 6), (), (5, 6), ()]
    assert [constants["FULL"] for constants in launched] == [False, False, False, True]


@pytest.mark.parametrize("shape", WALK)
def test_writes_nothing_else_and_all_of_y(shape):
    case = walk_case(*shape, torch.float16)
    n, f, h, w = shape[0], shape[4], *shape[2]
    count = n * f * h * w
    buffer = torch.full((count + 8192,), float("nan"), device=DEVICE, dtype=torch.float16)
    y = buffer[4096 : 4096 + count].view(n, h, w, f).permute(0, 3, 1, 2)
    last = torch.channels_last
    tensors = *(case[k].contiguous(memory_format=last) for k in ("x", "encoder", "decoder")), case["bias"], None
    conv2d_walk.plan_conv2d_walk(*tensors, None)(*tensors, y)
    assert buffer[:4096].isnan().all() and buffer[4096 + count :].isnan().all() and torch.isfinite(y).all()


@pytest.mark.parametrize("shape", WALK)
def test_does_not_read_beyond_its_inputs(shape, monkeypatch):
    """Every address that the interpreter loads from without a mask lies inside a tensor."""
    if DEVICE == "cuda":
        pytest.skip("compute-sanitizer checks this on a GPU")
    case = {
        k: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        for k, t in walk_case(*shape, torch.float16).items()
    }
    seen = watched_loads(monkeypatch, case.values())
    lowrank_conv2d(**case, **SAME, backend="fused")
    assert seen and all(seen)


def test_images_far_from_one_another(monkeypatch):
    """Places in 64 bits, as for tiles whose images are more than 2^31 elements apart."""
    seen = []
    monkeypatch.setattr(conv2d_walk, "is_far", lambda elements: seen.append(elements) or True)
    compare(walk_case(3, 16, (4, 6), 16, 32, torch.float16))
    assert set(seen) == {8 * 4 * 6 * 32}


def test_gradients():
    case = walk_case(2, 16, (4, 5), 16, 32, torch.float16) | {"residual": random(2, 32, 4, 5, dtype=torch.float16)}
    grads = []
    for side in ("fused", "two-op"):
        own = {k: t.clone().requires_grad_() for k, t in case.items()}
        y = lowrank_conv2d(**own, **SAME, activation="gelu", backend=side)
        grads.append(torch.autograd.grad(y.float().square().sum(), list(own.values())))
    for fused, plain in zip(*grads, strict=True):
        assert float(plain.norm()) > 0 and error(fused, plain) < 4e-3


def test_the_operator_is_well_formed():
    case = walk_case(2, 16, (4, 5), 16, 32, torch.float16)
    args = *case.values(), None, 1, [1, 1], [1, 1], [1, 1], "relu"
    torch.library.opcheck(torch.ops.alds_fast.lowrank_conv2d.default, args)
    assert ran(lambda: lowrank_conv2d(**case, **SAME, backend="fused")) == ["alds_fast.lowrank_conv2d.default"]


def test_what_fusing_saves_at_most_knows_the_taps_of_the_decoder(monkeypatch):
    """As of the layer of scheme 0 with channels and filters swapped; large layers are not timed."""
    h200 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, clock_rate=1980000, memory_clock_rate=3125000,
                           memory_bus_width=6144)  # fmt: skip
    monkeypatch.setattr(backend, "_properties", lambda device: h200)
    x, large = walk_case(2, 16, (5, 6), 16, 64, torch.float16), walk_case(2, 16, (5, 6), 16, 512, torch.float16)
    assert backend._why_not_timed(x["x"], x["encoder"], x["decoder"]) is None
    said = "not timed: fusing saves at most 10% of the products' time"
    assert backend._why_not_timed(large["x"], large["encoder"], large["decoder"]) == said


REFUSED = [  # channels, width, rank, filters, kernel, options, reason
    (80, 4, 16, 32, 3, {}, r"the channels are 80, a 3 x 3 decoder takes 16, 32, 48 and 64"),
    (24, 4, 16, 32, 3, {}, r"the channels are 24, a 3 x 3"),
    (16, 4, 48, 32, 3, {}, r"the rank is 48, a 3 x 3 decoder takes 16 and 32"),
    (16, 4, 16, 72, 3, {}, r"the filters are 72, a 3 x 3"),
    (16, 65, 16, 32, 3, {}, r"images are 65 wide, a 3 x 3 decoder takes up to 64"),
    (16, 8, 16, 32, 5, {"padding": 2}, r"the decoder has kernel \(5, 5\), the kernel of scheme 3 takes \(3, 3\)"),
    (16, 4, 16, 32, 3, {"stride": 2}, r"the decoder has stride \(2, 2\)"),
    (16, 4, 16, 32, 3, {"padding": 0}, r"the decoder has padding \(0, 0\)"),
    (16, 8, 16, 32, 3, {"padding": 2, "dilation": 2}, r"the decoder has padding \(2, 2\)"),
    (16, 8, 16, 32, 3, {"dilation": 2}, r"the decoder has dilation \(2, 2\)"),
    (32, 4, 16, 32, 3, {"groups": 2}, r"there are 2 channel slices, a 3 x 3 decoder takes 1"),
]


@pytest.mark.parametrize("c, w, rank, f, kernel, options, reason", REFUSED)
def test_refusals_say_what_is_taken(c, w, rank, f, kernel, options, reason):
    groups = options.get("groups", 1)
    case = conv_case(1, c, (8, w), groups, rank // groups, f, ((1, 1), (kernel, kernel)), torch.float16)
    with pytest.raises(BackendError, match=reason):
        lowrank_conv2d(**case, **(SAME | options), backend="fused")
    two_op, first = (lowrank_conv2d(**case, **(SAME | options), backend=b) for b in ("two-op", "fused-first"))
    assert torch.equal(two_op, first)


def test_float32_and_schemes_1_and_2_are_refused():
    with pytest.raises(BackendError, match=r"x is torch.float32, a 3 x 3 decoder takes float16 and bfloat16"):
        lowrank_conv2d(**walk_case(1, 16, (4, 4), 16, 16, torch.float32), **SAME, backend="fused")
    case = conv_case(1, 16, (5, 5), 1, 16, 16, ((1, 3), (3, 1)), torch.float16)
    with pytest.raises(BackendError, match=r"both have a kernel \(schemes 1 and 2 run as two calls\)"):
        lowrank_conv2d(**case, **SAME, backend="fused")


def test_layers_know_what_is_refused():
    layer = alds.LowRankConv2d(16, 32, 3, 16, scheme=3, padding=1).to(DEVICE, torch.float16)
    x = random(2, 16, 5, 6, dtype=torch.float16)
    assert layer.why_not_fused(x) is None
    layer.backend = "fused"
    plain = layer._decode(layer._encode(x, layer.encoder, None), layer.decoder, layer.bias)
    torch.testing.assert_close(layer(x), plain, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(layer(x[0]), plain[0], rtol=2e-3, atol=2e-3)
    strided = alds.LowRankConv2d(16, 32, 3, 16, scheme=3, padding=1, stride=2).to(DEVICE, torch.float16)
    mirrored = alds.LowRankConv2d(16, 32, 3, 16, scheme=3, padding=1, padding_mode="reflect").to(DEVICE, torch.float16)
    assert "stride (2, 2)" in strided.why_not_fused(x) and "padding (0, 0)" in mirrored.why_not_fused(x)
