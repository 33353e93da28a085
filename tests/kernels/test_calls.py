"""Calls of a kind that was seen before only launch; whatever differs is checked and chosen anew."""

import copy
import gc
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from support.kernel_cases import DEVICE, as_int8, by_one, conv_case, linear_case, pivoted_case, random, walk_case

from alds_fast.errors import ArgumentError
from alds_fast.kernels import (
    EncodeKey,
    Tiling,
    calls,
    functional,
    lowrank_conv2d,
    lowrank_linear,
    lowrank_linears,
    op_linear,
    using,
)
from alds_fast.kernels.fused import linear

SCALES = as_int8(linear_case(3, 32, 2, 5, 24))[1]


def merged(seed):
    factors = random(12, 40, seed=seed), [random(20, 5, seed=seed), random(30, 7, seed=seed)]
    return {"x": random(4, 40, seed=seed), "encoder": factors[0], "decoders": factors[1], "biases": [None, random(30)]}


KINDS = {  # tensors, function, options
    "few rows": (linear_case(3, 32, 2, 5, 24), lowrank_linear, {"groups": 2, "activation": "gelu"}),
    "many rows": (linear_case(20, 32, 1, 5, 24), lowrank_linear, {}),
    "pivots": (pivoted_case(20, 24, 5, 30)[0], lowrank_linear, {"order": pivoted_case(20, 24, 5, 30)[1]}),
    "int8": (as_int8(linear_case(3, 32, 2, 5, 24))[0], lowrank_linear, {"groups": 2, "scales": SCALES}),
    "int8, many rows": (as_int8(linear_case(20, 32, 1, 5, 24))[0], lowrank_linear,
                        {"scales": as_int8(linear_case(20, 32, 1, 5, 24))[1]}),
    "convolution": (conv_case(2, 8, (5, 6), 2, 3, 12, by_one(3, 3)), lowrank_conv2d, {"groups": 2, "padding": [1, 1]}),
    "pointwise": (conv_case(2, 8, (5, 6), 1, 3, 12, by_one(1, 1)), lowrank_conv2d, {"activation": "relu"}),
    "walk": (walk_case(2, 16, (5, 6), 16, 32, torch.float16), lowrank_conv2d, {"padding": 1}),
    "merged": (merged(0), lowrank_linears, {}),
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """The backends of calls that are looked at; nothing is known before."""
    monkeypatch.setattr(calls, "_known", {})
    seen, choose = [], functional.is_fused

    def is_fused(kind, backend, *rest):
        seen.append(backend)
        return choose(kind, backend, *rest)

    monkeypatch.setattr(functional, "is_fused", is_fused)
    return seen


def other_values(value):
    if isinstance(value, list):
        return [other_values(v) for v in value]
    return value if value is None else (value * 3) if value.is_floating_point() else value.flip(0)


def every(result):
    return result if isinstance(result, list) else [result]


@pytest.mark.parametrize("backend", ["fused", "two-op", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_later_call_has_its_own_values_and_is_not_looked_at(asked, kind, backend):
    tensors, call, options = KINDS[kind]
    later = {k: other_values(v) for k, v in tensors.items()}
    call(**tensors, **options, backend=backend)
    count = len(asked)
    results = [call(**later, **options, backend=backend) for _ in range(2)]
    assert len(asked) == count + (2 if kind == "int8, many rows" else 0)
    plain = call(**later, **options, backend="two-op")
    for result in results:
        for mine, right in zip(every(result), every(plain), strict=True):
            tolerance = 1e-4 if mine.dtype == torch.float32 else 1e-2
            torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance)
            assert mine.shape == right.shape


def shifted(x):
    """The same values, one element further on in memory."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


OTHERS = {
    "rows": lambda case: {**case, "x": case["x"][:2]},
    "strides": lambda case: {**case, "x": case["x"].t().contiguous().t()},
    "alignment": lambda case: {**case, "decoder": shifted(case["decoder"])},
    "no bias": lambda case: {**case, "bias": None},
    "type": lambda case: {k: t.half() for k, t in case.items()},
    "activation": lambda case: {**case, "activation": "relu"},
    "groups": lambda case: {**case, "encoder": case["encoder"].repeat(1, 2), "groups": 1},
    "gradients": lambda case: {**case, "encoder": case["encoder"].clone().requires_grad_()},
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_differs_is_looked_at(asked, other):
    case = linear_case(3, 32, 2, 5, 24, residual=False)
    del case["residual"]
    lowrank_linear(**case, groups=2, backend="fused")
    options = {"groups": 2, **OTHERS[other](case)}
    fused, plain = (lowrank_linear(**options, backend=backend) for backend in ("fused", "two-op"))
    assert asked == ["fused", "fused", "two-op"]
    torch.testing.assert_close(fused, plain, rtol=1e-2, atol=1e-2)


def test_modes_are_asked_for_every_time(asked):
    case = linear_case(3, 32, 1, 5, 24)
    lowrank_linear(**case, backend="fused")
    with torch.autocast(DEVICE, torch.float16):
        assert lowrank_linear(**case, backend="fused").dtype == torch.float16
    with torch.profiler.profile():
        lowrank_linear(**case, backend="fused")
    torch.vmap(lambda x: lowrank_linear(x, case["encoder"], case["decoder"], backend="two-op"))(case["x"])
    assert asked == ["fused", "fused", "fused", "two-op"]


def test_arguments_are_checked_though_others_were_seen(asked):
    case = linear_case(3, 32, 1, 5, 24)
    lowrank_linear(**case, backend="fused")
    for wrong in ({"groups": 1.0}, {"groups": [1]}, {"activation": "tanh"}, {"x": case["x"][:, :5]}):
        with pytest.raises(ArgumentError):
            lowrank_linear(**{**case, "groups": 1, **wrong}, backend="fused")


def test_the_precision_of_products_is_part_of_a_kind(asked):
    case = linear_case(3, 32, 1, 5, 24)
    lowrank_linear(**case, backend="fused")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        lowrank_linear(**case, backend="fused")
    finally:
        torch.set_float32_matmul_precision(before)
    lowrank_linear(**case, backend="fused")
    assert len(asked) == 2


def test_values_that_are_not_where_a_tensor_points_to(asked):
    case = linear_case(3, 32, 1, 5, 24)
    for backend in ("fused", "two-op"):
        lowrank_linear(**case, backend=backend)
    flipped = {**case, "x": torch._neg_view(case["x"])}
    fused, plain = (lowrank_linear(**flipped, backend=backend) for backend in ("fused", "two-op"))
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    sparse = lowrank_linear(case["x"].to_sparse(), case["encoder"], case["decoder"], backend="two-op")
    assert sparse.shape == (3, 24) and len(asked) == 5


@pytest.mark.parametrize("rows", [1, 5])
def test_scales_with_gaps_between_them(asked, rows):
    case, scales, _ = as_int8(linear_case(rows, 64, 1, 20, 24))
    apart = [torch.stack([s, 0 * s], 1)[:, 0] for s in scales]
    for given in (apart, apart, scales):
        fused, plain = (lowrank_linear(**case, scales=given, backend=backend) for backend in ("fused", "two-op"))
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-3)


def test_other_tilings_are_taken_at_once(asked, monkeypatch):
    case = linear_case(5, 64, 1, 20, 24)
    lowrank_linear(**case, backend="fused")
    encode = EncodeKey(torch.float32, 16, 64, 20, 1, False, "ieee")
    launched, launch = [], linear.plan_few_rows.__globals__["Launch"]

    def noting(kernel, grid, numbers, constants, **options):
        launched.append(constants["BK"])
        return launch(kernel, grid, numbers, constants, **options)

    monkeypatch.setitem(linear.plan_few_rows.__globals__, "Launch", noting)
    with using(torch.device(DEVICE), {encode: Tiling(16, 64, 16, 4, 2)}):
        lowrank_linear(**case, backend="fused")
    assert 64 in launched
    lowrank_linear(**case, backend="fused")
    assert 64 not in launched[-2:]


def test_nothing_of_a_call_is_kept_but_its_kind(asked):
    for tensors, call, options in KINDS.values():
        own = copy.deepcopy(tensors)
        alive = [weakref.ref(t) for v in own.values() for t in (v if isinstance(v, list) else [v]) if t is not None]
        for _ in range(2):
            call(**own, **options, backend="fused")
        del own
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]


def test_kinds_beyond_the_most_are_found_anew(asked, monkeypatch):
    monkeypatch.setattr(calls, "_MOST", 3)
    for rows in (1, 2, 3, 4, 5, 1):
        lowrank_linear(**linear_case(rows, 8, 1, 2, 8), backend="two-op")
    assert len(calls._known) <= 3 and len(asked) == 6


def test_what_is_not_decided_yet_is_asked_again(asked, monkeypatch):
    """As in a capture of a graph, before anything was measured."""
    monkeypatch.setattr(functional, "is_fused", lambda *args: asked.append("auto"))
    case = linear_case(3, 32, 1, 5, 24)
    for _ in range(2):
        torch.testing.assert_close(lowrank_linear(**case), lowrank_linear(**case, backend="auto"))
    assert len(asked) == 4 and not calls._known


def test_rows_far_from_one_another(asked, monkeypatch):
    seen = []
    monkeypatch.setattr(linear, "is_far", lambda elements: seen.append(elements) or True)
    case = linear_case(40, 30, 3, 5, 33)
    x = random(40, 4096)[:, :30]
    fused = lowrank_linear(**{**case, "x": x}, groups=3, backend="fused")
    assert set(seen) == {32 * 4096}
    torch.testing.assert_close(fused, lowrank_linear(**{**case, "x": x}, groups=3, backend="two-op"))


@pytest.mark.slow
def test_a_later_launch_hands_over_what_triton_did():
    """Kernels compiled for a device that is not there: grid, tensors, numbers and constants."""
    paths = os.pathsep.join(["tests", os.environ.get("PYTHONPATH", "")])
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": paths}
    command = [sys.executable, "-m", "support.launched_twice"]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    kinds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kinds) == 9
    for name, first, second in kinds:
        assert first == second and all(values for _, values in first), name


def test_the_plan_of_an_empty_call_launches_nothing():
    plan = op_linear.plan_linear_call((random(0, 8), random(2, 8), random(5, 2), None, None, None), 1, None)
    assert plan(random(0, 8)).shape == (0, 5)
