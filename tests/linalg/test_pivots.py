"""Factors without an identity: the same product, bounded coefficients, sizes that are counted, rounding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import weight_shapes

import alds_fast as alds
from alds_fast.errors import ArgumentError
from alds_fast.layers import low_rank_like
from alds_fast.linalg import Decomposition, WeightShape, folding, pivots

CONV = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}


def dense_layer(shape):
    if not shape.kernel:
        return torch.nn.Linear(shape.in_channels, shape.out_channels, dtype=torch.float64)
    return CONV[len(shape.kernel)](
        shape.in_channels, shape.out_channels, shape.kernel, groups=shape.conv_groups, dtype=torch.float64
    )


@given(weight_shapes(), st.sampled_from(folding.SCHEMES), st.data())
def test_the_recomposed_weight_is_that_of_plain_factors(shape, scheme, data):
    groups = data.draw(st.sampled_from(folding.divisors(shape.slice_channels)))
    form = pivots.pivots_of_fold(shape, scheme, groups)
    side = shape.filters_per_group if form == "output" else shape.slice_channels // groups
    most = min(folding.max_rank(shape, scheme, groups), side - 1)
    if not form or not most or (scheme,) != folding.distinct_schemes((scheme,), shape.kernel):
        return
    rank = data.draw(st.integers(1, most))
    g0, rows, cols = folding.matrix_shape(shape, scheme)
    left = torch.randn(g0, groups, rows, rank, dtype=torch.float64)
    right = torch.randn(g0, groups, rank, cols // groups, dtype=torch.float64)
    chosen = Decomposition(scheme, groups, rank, form)
    plain, pivoted = (low_rank_like(dense_layer(shape), d) for d in (chosen._replace(pivots=""), chosen))
    for low in (plain, pivoted):
        low.set_factors(left, right, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(pivoted.dense_weight(), plain.dense_weight(), rtol=1e-9, atol=1e-9)
    stored = pivoted.decoder if form == "output" else pivoted.encoder
    assert float(stored.detach().abs().max()) <= pivots.LARGEST + 1e-9
    assert (pivoted.encoder.shape, pivoted.decoder.shape) == chosen.factor_shapes(shape)
    numbers = pivoted.encoder.numel() + pivoted.decoder.numel() + pivoted.order.numel()
    assert numbers == chosen.params(shape) and sorted(pivoted.order.tolist()) == list(range(pivoted.order.numel()))
    encoder, decoder = pivoted.plain_factors()
    assert (encoder.shape, decoder.shape) == folding.factor_shapes(shape, scheme, groups, rank)
    pivoted.update_factors(2 * left, right)
    torch.testing.assert_close(pivoted.dense_weight(), 2 * plain.dense_weight(), rtol=1e-9, atol=1e-9)


def matrices():
    generator = torch.Generator().manual_seed(0)
    basis = [torch.linalg.qr(torch.randn(96, 96, generator=generator, dtype=torch.float64))[0] for _ in range(2)]
    spectra = {
        "flat": torch.ones(96), "falling": 0.95 ** torch.arange(96), "clustered": (torch.arange(96) < 30) + 0.05,
        "rank-deficient": (torch.arange(96) < 40) * 0.98 ** torch.arange(96),
    }  # fmt: skip
    yield from ((name, basis[0] * values @ basis[1]) for name, values in spectra.items())
    scales = 10 ** (8 * torch.rand(96, 1, generator=generator, dtype=torch.float64) - 4)
    yield "rows scaled", scales * torch.randn(96, 96, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("name", "weight"), list(matrices()), ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("groups", "form"), [(1, "output"), (4, "input")])
def test_rounding_hardly_adds_to_truncation(name, weight, dtype, groups, form):
    """Where that is 5 % at least, as it is where half types get pivots."""
    weight = weight / weight.norm() * 30
    dense, tried = torch.nn.Linear(96, 96, bias=False, dtype=torch.float64), 0
    dense.weight.data = weight
    for rank in (4, 9, 16, 23) if groups == 4 else (8, 16, 32, 64):
        errors = []
        for pivot in ("", form):
            low = alds.LowRankLinear.from_dense(dense, rank=rank, groups=groups, pivots=pivot)
            exact = float((low.dense_weight() - weight).norm() / weight.norm())
            rounded = low.to(dtype)
            encoder, decoder = (f.double() for f in rounded.plain_factors())
            whole = folding.weights_to_dense(encoder, decoder, low.weight_shape, 0, groups)
            errors.append(float((whole - weight).norm() / weight.norm()))
        if exact >= 0.05:
            tried += 1
            assert errors[1] <= 1.02 * errors[0], (rank, exact, errors)
    assert tried or name in ("rank-deficient", "rows scaled")


def test_exchanges_bound_every_coefficient():
    n, generator = 24, torch.Generator().manual_seed(0)
    basis = torch.randn(64, n, dtype=torch.float64, generator=generator)
    basis[:n] *= 1e-3
    order, coefficients = pivots.choose_pivots(torch.stack([basis, basis.flip(0)]))
    assert float(coefficients.abs().max()) <= pivots.LARGEST
    assert all(bool((part.diff() > 0).all()) for part in order.tensor_split([n], 1))
    for one, rows, told in zip((basis, basis.flip(0)), order, coefficients, strict=True):
        torch.testing.assert_close(told @ one[rows[:n]], one[rows[n:]])
    wild = torch.linalg.solve(basis[:n], basis[n:], left=False)  # the first rows as pivots
    assert float(wild.abs().max()) > 100
    settled, told = torch.arange(64), wild.clone()
    pivots._exchange(settled, told)
    torch.testing.assert_close(told @ basis[settled[:n]], basis[settled[n:]])
    assert float(torch.linalg.solve(basis[settled[:n]], basis[settled[n:]], left=False).abs().max()) <= 2.0 + 1e-9


def test_a_basis_with_a_zero_column_has_finite_coefficients():
    basis = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis[:, 2] = 0
    order, coefficients = pivots.choose_pivots(basis[None])
    assert float(coefficients.abs().max()) <= pivots.LARGEST
    torch.testing.assert_close(coefficients[0] @ basis[order[0, :4]], basis[order[0, 4:]])


def test_what_has_no_pivots_is_refused():
    shape = WeightShape(8, 8, (3, 3))
    for chosen in ((1, 1, 2, "output"), (0, 2, 2, "output"), (0, 1, 2, "input"), (0, 1, 8, "output")):
        with pytest.raises(ArgumentError, match=r"pivots='(output|input)' with rank=\d: allowed for"):
            Decomposition(*chosen).check(shape)
    with pytest.raises(ValueError, match="pivots are 'both'"):
        Decomposition.from_dict({"scheme": 0, "groups": 1, "rank": 1, "pivots": "both"})
    assert Decomposition.from_dict({"scheme": 0, "groups": 1, "rank": 1}) == (0, 1, 1, "")


def test_zero_and_deficient_factors():
    for weight in (torch.zeros(6, 6), torch.ones(6, 6)):
        dense = torch.nn.Linear(6, 6, bias=False)
        dense.weight.data = weight
        low = alds.LowRankLinear.from_dense(dense, rank=3, pivots="output")
        torch.testing.assert_close(low.dense_weight(), weight)


def test_several_large_slices_on_two_threads():
    """Where batched LU of MKL fails."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        basis = torch.randn(3, 512, 257, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        order, coefficients = pivots.choose_pivots(basis)
    finally:
        torch.set_num_threads(threads)
    for one, rows, told in zip(basis, order, coefficients, strict=True):
        torch.testing.assert_close(told @ one[rows[:257]], one[rows[257:]])
