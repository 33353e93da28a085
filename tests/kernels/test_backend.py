"""Which backend runs: the fused kernel, or two calls of torch; and what is said where the kernel cannot."""

from types import SimpleNamespace

import pytest
import torch
from support.kernel_cases import DEVICE, by_one, conv_case, linear_case, ran, random

import alds_fast as alds
from alds_fast.errors import BackendError
from alds_fast.kernels import backend as chooser
from alds_fast.kernels import (
    decisions,
    limits,
    lowrank_conv2d,
    lowrank_linear,
    lowrank_linears,
)
from alds_fast.kernels.fused import conv2d, launching, linear


def test_fused_runs_the_kernel_and_nothing_else(monkeypatch):
    monkeypatch.setattr(launching, "is_on_device", lambda tensors: False)  # all launches are seen
    launched = []
    for module, name in ((linear, "_lowrank_linear_kernel"), (conv2d, "_conv2d_taps_kernel")):
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


def test_auto_times_nothing_where_fusing_cannot_win(monkeypatch):
    h200 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, clock_rate=1980000,
                           memory_clock_rate=3125000, memory_bus_width=6144)  # fmt: skip
    monkeypatch.setattr(chooser, "_can_measure", lambda x: True)
    monkeypatch.setattr(chooser, "_decisions", {})
    monkeypatch.setattr(chooser, "_time_ms", lambda call: 1.0)
    monkeypatch.setattr(chooser, "_properties", lambda device: h200)
    x = random(32, 4096).half()
    wide = random(8, 4096).half(), random(64, 8).half()
    lowrank_linear(x, *wide)
    lowrank_linear(x[:, :64], wide[0][:, :64], wide[1])
    lowrank_linear(x[:16], *wide)  # the kernels for few rows save launches too
    first, *others = decisions()
    assert first["ran"] == "two-op" and first["note"] == "not timed: fusing saves at most 11% of the products' time"
    assert [d["two_op_ms"] for d in others] == [1.0, 1.0]
    monkeypatch.setattr(h200, "major", 12)  # of which no speed is known
    lowrank_linear(x[:, :4064], wide[0][:, :4064], wide[1])
    assert decisions()[-1]["two_op_ms"] == 1.0


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
        if call.func.__name__ == "lowrank_linear_op":
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
    with pytest.raises(BackendError, match="schemes 1 and 2 run as two calls"):
        lowrank_conv2d(**conv_case(1, 8, (5, 5), 1, 3, 20, ((1, 3), (3, 1))), backend="fused")
    with pytest.raises(BackendError, match="up to 16 rows"):
        lowrank_linears(case["x"], case["encoder"], [case["decoder"]], backend="fused")
    with pytest.raises(BackendError, match="up to 3 layers are merged, got 4"):
        lowrank_linears(case["x"][:2], case["encoder"], [random(8, 1)] * 4, backend="fused")
    monkeypatch.setattr(chooser, "HAS_TRITON", False)
    with pytest.raises(BackendError, match="triton is not installed"):
        lowrank_linear(**case, backend="fused")
    assert lowrank_linear(**case).shape == (20, 8)


def test_fused_on_the_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(chooser, "_is_interpreted", lambda: False)
    case = {k: v.cpu() for k, v in linear_case(20, 16, 1, 4, 8).items()}
    with pytest.raises(BackendError, match="it runs on CUDA devices, x is on the CPU"):
        lowrank_linear(**case, backend="fused")


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
