"""pytest-benchmark entries: what a fused call costs the host, beside F.linear; every launch is replaced by nothing.

A product of 1 x 64 numbers, so that F.linear costs little more than being called.
"""

import importlib

import pytest
import torch
import torch.nn.functional as F

from alds_fast.kernels import lowrank_linear


class Nothing:
    """In the place of a kernel: it compiles to a launch that does nothing."""

    def __init__(self, kernel):
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        return lambda *arguments, **named: Launched()


class Launched:
    """In the place of a compiled kernel."""

    def __getitem__(self, grid):
        return lambda *arguments: None


KERNELS = {
    "few_rows": ("_encode_rows_kernel", "_decode_rows_kernel", "encode_vectors_kernel"),
    "linear": ("_lowrank_linear_kernel",),
}


@pytest.fixture
def no_launches(monkeypatch):
    for module, names in KERNELS.items():
        holder = importlib.import_module(f"alds_fast.kernels.fused.{module}")
        for name in names:
            monkeypatch.setattr(holder, name, Nothing(getattr(holder, name)))
    monkeypatch.setattr("alds_fast.kernels.fused.launching.is_on_device", lambda tensors: True)
    monkeypatch.setattr("alds_fast.kernels.backend._device_reason", lambda kind, index: None)
    monkeypatch.setattr("alds_fast.kernels.calls._known", {})


@pytest.mark.parametrize("call", ["F.linear", "fused", "two-op"])
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_host(benchmark, no_launches, rows, call):
    benchmark.group = f"host, {rows} x 64"
    x, weight, bias = (torch.randn(shape, device="cpu") for shape in ((rows, 64), (64, 64), (64,)))
    encoder, decoder = (torch.randn(shape, device="cpu") for shape in ((16, 64), (64, 16)))

    def run():
        if call == "F.linear":
            return F.linear(x, weight, bias)
        return lowrank_linear(x, encoder, decoder, bias, backend=call)

    with torch.no_grad():
        run()
        benchmark(run)
