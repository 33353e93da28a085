"""pytest-benchmark entries: every kernel, dense against two calls against fused; fused needs a GPU."""

import pytest
import torch

import alds_fast as alds
from alds_fast.layers import MergedLinears

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
LAYERS = {
    "conv3x3 64 q=16": (lambda: alds.LowRankConv2d(64, 64, 3, 16, padding=1), (8, 64, 56, 56)),
    "conv3x3 128 q=32, 4 slices": (lambda: alds.LowRankConv2d(128, 128, 3, 8, groups=4, padding=1), (8, 128, 28, 28)),
    "linear 768 -> 3072 q=128": (lambda: alds.LowRankLinear(768, 3072, 128), (197, 768)),
    "linear 1024 -> 1024 q=256, 4 rows": (lambda: alds.LowRankLinear(1024, 1024, 256), (4, 1024)),
}


def call(benchmark, module, x):
    def run():
        y = module(x)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return y

    with torch.no_grad():
        run()
        benchmark(run)


@pytest.mark.parametrize("backend", ["dense", "two-op", "fused"])
@pytest.mark.parametrize("name", list(LAYERS))
def test_layer(benchmark, name, backend):
    build, shape = LAYERS[name]
    benchmark.group = name
    layer, x = build().to(DEVICE, DTYPE), torch.randn(shape, device=DEVICE, dtype=DTYPE)
    if x.dim() == 4:
        layer, x = (t.to(memory_format=torch.channels_last) for t in (layer, x))
    if backend == "fused" and (reason := layer.why_not_fused(x)):
        pytest.skip(reason)
    layer.backend = backend if backend != "dense" else "two-op"
    call(benchmark, layer.to_dense() if backend == "dense" else layer, x)


@pytest.mark.parametrize("backend", ["separate", "two-op", "fused"])
@pytest.mark.benchmark(group="q/k/v 1024, q=256 each, 4 rows")
def test_lowrank_linears(benchmark, backend):
    layers = [alds.LowRankLinear(1024, 1024, 256, device=DEVICE, dtype=DTYPE) for _ in range(3)]
    x = torch.randn(4, 1024, device=DEVICE, dtype=DTYPE)
    merged = MergedLinears(layers, backend if backend != "separate" else "two-op")
    if backend == "fused" and (reason := merged.why_not_fused(x)):
        pytest.skip(reason)
    call(benchmark, (lambda x: [layer(x) for layer in layers]) if backend == "separate" else merged, x)
