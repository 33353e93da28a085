"""pytest-benchmark entries: spectra against torch's own routines, compression end to end, the allocator."""

import numpy as np
import pytest
import torch

import alds_fast as alds
from benchmarks.common.networks import SHAPED
from benchmarks.cpu import spectra

once = {"rounds": 3, "iterations": 1, "warmup_rounds": 1}


@pytest.fixture(scope="module", params=list(SHAPED))
def model(request):
    return SHAPED[request.param]()


@pytest.mark.parametrize(
    "way",
    [
        ("alds_fast", spectra.our_spectra),
        ("eigvalsh64", lambda m: spectra.eigvalsh_per_groups(m, torch.float64)),
        ("eigvalsh32", lambda m: spectra.eigvalsh_per_groups(m, torch.float32)),
        ("svdvals64", lambda m: spectra.svdvals_slice_by_slice(m, torch.float64)),
        ("svdvals32", lambda m: spectra.svdvals_slice_by_slice(m, torch.float32)),
    ],
    ids=lambda way: way[0],
)
@pytest.mark.benchmark(group="spectra, scheme 0, all divisors")
def test_spectra(benchmark, model, way):
    benchmark.pedantic(way[1], args=(model,), rounds=2 if "svdvals" in way[0] else 3, iterations=1)


@pytest.mark.parametrize("schemes", [(0,), (0, 1, 2, 3)], ids=["scheme0", "all-schemes"])
@pytest.mark.benchmark(group="compress, params=0.5")
def test_compress(benchmark, model, schemes):
    small = benchmark.pedantic(alds.compress, args=(model,), kwargs={"params": 0.5, "schemes": schemes}, **once)
    assert small.alds_plan.keep_ratio <= 0.5


@pytest.fixture(scope="module")
def problem():
    return spectra.large_problem()


@pytest.mark.parametrize("p", [np.inf, 2.0])
@pytest.mark.benchmark(group="allocator, 300 layers x 12 groups x 4096 ranks, Pareto fronts included")
def test_allocate(benchmark, problem, p):
    benchmark.pedantic(spectra.solve, args=(problem, p), **once)
