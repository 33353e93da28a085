"""Arguments that do not fit together are refused, whichever backend would run."""

import pytest
import torch
from support.kernel_cases import DEVICE, by_one, conv_case, linear_case, random

from alds_fast.errors import ArgumentError
from alds_fast.kernels import (
    lowrank_conv2d,
    lowrank_linear,
    lowrank_linears,
)


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


ORDER = torch.arange(11, device=DEVICE)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"groups": 2}, "order= goes with one slice, groups=2"),
        ({"order": ORDER[1:]}, "order is torch.int64 of shape (10,): expected torch.int64 of (11,)"),
        ({"order": ORDER.int()}, "order is torch.int32 of shape (11,)"),
        ({"order": ORDER.to("meta")}, "order is on meta, x on"),
        ({"bias": random(8)}, "bias has shape (8,), decoder (8, 3) needs (11,)"),
    ],
)
def test_bad_tables_of_pivots(options, message):
    case = linear_case(4, 16, 1, 3, 8, bias=False, residual=False) | {"order": ORDER} | options
    for backend in ("fused", "two-op"):
        with pytest.raises(ArgumentError) as raised:
            lowrank_linear(**case, backend=backend)
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
