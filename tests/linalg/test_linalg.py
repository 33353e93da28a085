import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.marks import slow

from alds_fast import linalg
from alds_fast.errors import ArgumentError, DependencyError
from alds_fast.linalg import _core, cpp_core, divisors, torch_backend
from alds_fast.linalg.torch_backend import batched_rsvd_ref, rsvd_torch, spectra_ref, spectra_torch


def _matrix(batch, rows, cols, dtype=torch.float64, seed=0):
    return torch.randn(batch, rows, cols, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _decaying(rows, cols, seed=0):
    """Singular values 1 .. 1e-3, geometric."""
    u, _, vh = torch.linalg.svd(_matrix(1, rows, cols, seed=seed)[0], full_matrices=False)
    s = torch.logspace(0, -3, min(rows, cols), dtype=torch.float64)
    return ((u * s) @ vh)[None]


def _slice_errors(matrix, groups, factors):
    slices = matrix.double().unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return (slices - factors.left.double() @ factors.right.double()).square().sum((1, 2))


# ------------------------------------------------------------------------------------------------ spectra


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 48), st.sampled_from([torch.float32, torch.float64]))
def test_spectra_equal_a_full_svd_of_every_slice(batch, rows, cols, dtype):
    matrix = _matrix(batch, rows, cols, dtype)
    ks = divisors(cols)
    for values, expected in zip(linalg.spectra([matrix], [ks])[0], spectra_ref(matrix, ks), strict=True):
        assert values.dtype == torch.float64
        torch.testing.assert_close(values, expected, rtol=0, atol=2e-7 * float(expected.max() + 1))


@pytest.mark.parametrize("ks", [(1, 2, 3, 4, 6, 12), (12, 4, 6), (3,), (8, 12), (24, 1)])
def test_spectra_share_grams_for_any_selection_of_groups(ks):
    """Group counts that do not divide one another need Gram matrices of their own."""
    for rows in (2, 9, 30):
        matrix = _matrix(2, rows, 24 * 3)
        for values, expected in zip(linalg.spectra([matrix], [ks])[0], spectra_ref(matrix, ks), strict=True):
            torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)


def test_spectra_of_a_batch_of_layers_are_those_of_each():
    matrices = [_matrix(1, 20, 36), _matrix(5, 3, 8, torch.float32), _matrix(1, 64, 16)]
    groups = [[1, 4], [8, 1, 2], [2]]
    together = linalg.spectra(matrices, groups)
    for matrix, ks, values in zip(matrices, groups, together, strict=True):
        alone = linalg.spectra([matrix], [ks])[0]
        assert all(torch.equal(a, b) for a, b in zip(values, alone, strict=True))


def test_spectra_resolve_small_values_to_1e_minus_8():
    """The precision that the documentation states for float64 Gram matrices."""
    matrix = _decaying(60, 90)
    values, expected = linalg.spectra([matrix], [[1]])[0][0], spectra_ref(matrix, [1])[0]
    assert float((values - expected).abs().max()) < 1e-8
    tiny = torch.diag(torch.tensor([1.0, 1e-3, 1e-6], dtype=torch.float64))[None]
    torch.testing.assert_close(linalg.spectra([tiny], [[1]])[0][0][0, 0], tiny[0].diagonal(), rtol=1e-3, atol=1e-9)


def _large(kind, order):
    matrix = _matrix(1, order, order + 3)
    if kind == "diagonal":
        return torch.diag_embed(torch.linspace(0, 1, order, dtype=torch.float64))[None]
    if kind == "low rank":
        return matrix[..., :3] @ matrix[:, :3]
    if kind == "blocks":
        matrix[:, : order // 2, order // 2 :] = matrix[:, order // 2 :, : order // 2] = 0.0
        matrix[:, : order // 2] *= 1e-80
    return matrix


@pytest.mark.parametrize("order", [slow(1024), slow(1025), slow(1056), 1057, slow(1058), slow(1087), slow(1130)])
def test_spectra_of_large_slices_by_two_stages(order):
    """Orders that end in every way a band of 32 columns."""
    matrix = _large("random", order)
    expected = spectra_ref(matrix, [1])[0]
    values = linalg.spectra([matrix], [[1]])[0][0]
    torch.testing.assert_close(values.square(), expected.square(), rtol=0, atol=1e-13 * float(expected.max()) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diagonal", "low rank", "blocks"])
def test_spectra_of_large_slices_with_nothing_to_reflect(kind):
    matrix = _large(kind, 1061)
    expected = spectra_ref(matrix, [1])[0]
    values = linalg.spectra([matrix], [[1]])[0][0]
    torch.testing.assert_close(values.square(), expected.square(), rtol=0, atol=1e-13 * float(expected.max()) ** 2)


def test_spectra_of_zeros_are_zero():
    assert torch.equal(linalg.spectra([torch.zeros(1, 4, 6)], [[2]])[0][0], torch.zeros(1, 2, 3, dtype=torch.float64))


def test_results_do_not_depend_on_the_number_of_threads():
    matrix = _matrix(1, 300, 1200, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            spectra = linalg.spectra([matrix], [[1, 2, 5]])[0]
            factors = linalg.batched_rsvd([matrix], [2], [5], seed=3)[0]
            assert bool((factors.iterations > 0).all())  # by sketches, whose seeds must not depend on threads
            results.append([*spectra, *factors])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_spectra_torch_is_the_cuda_implementation():
    matrix = _matrix(2, 7, 12, torch.float32)
    flat = linalg.spectra([matrix], [[1, 3]])[0]
    torch.testing.assert_close(spectra_torch(matrix, [1, 3], float32=False), torch.cat([v.flatten(1) for v in flat], 1))
    assert spectra_torch(matrix, [], float32=False).shape == (2, 0)


@pytest.mark.parametrize(
    ("matrices", "groups", "message"),
    [
        ([torch.zeros(2, 3)], [[1]], r"matrices\[0\]: expected non-empty \(batch, rows, cols\)"),
        ([torch.zeros(1, 2, 0)], [[1]], r"matrices\[0\]: expected non-empty"),
        ([torch.zeros(1, 2, 3, dtype=torch.float16)], [[1]], r"matrices\[0\]: expected float32 or float64"),
        ([torch.zeros(1, 2, 3)], [[2]], r"groups\[0\]: 2 does not divide the 3 columns"),
        ([torch.zeros(1, 2, 3)], [[0]], r"groups\[0\]: 0 does not divide"),
        ([torch.zeros(1, 2, 3)], [[1], [1]], r"counts|groups"),
    ],
)
def test_spectra_name_the_bad_argument(matrices, groups, message):
    with pytest.raises(ArgumentError, match=message):
        linalg.spectra(matrices, groups)


def test_a_core_that_is_not_built_is_named(monkeypatch):
    monkeypatch.setattr(cpp_core, "__package__", "alds_fast.cli")  # a package without one, as in a source tree
    with pytest.raises(DependencyError, match="the C\\+\\+ core cannot be loaded .* start Python in another directory"):
        cpp_core.core.__wrapped__()


def test_core_checks_its_arguments_too():
    good = torch.zeros(1, 2, 4).numpy()
    for args, message in [
        (([good[0]], [[1]], False, 1), "matrices.*3 dimensions"),
        (([good], [[3]], False, 1), "groups.*does not divide"),
        (([good], [], False, 1), "groups: has length 0"),
        (([good], [[1]], False, 0), "threads"),
        (([good.astype("float16")], [[1]], False, 1), "matrices.*float32 or float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            _core.spectra(*args)
    with pytest.raises(ValueError, match=r"ranks\[0\]: 3 is outside 1\.\.2"):
        _core.batched_rsvd([good], [1], [3], [torch.zeros(1).double().numpy()], 0, 8, 4, 1e-3, 0.1, 1)


# ------------------------------------------------------------------------------------------- batched_rsvd


@given(st.integers(1, 3), st.integers(1, 20), st.sampled_from([1, 2, 3]), st.integers(1, 8), st.data())
def test_batched_rsvd_is_optimal_and_reports_its_error(batch, rows, groups, width, data):
    rank = data.draw(st.integers(1, min(rows, width)))
    matrix = _matrix(batch, rows, groups * width)
    factors = linalg.batched_rsvd([matrix], [groups], [rank])[0]
    reference = batched_rsvd_ref(matrix, groups, rank)
    scale = float(matrix.square().sum())
    torch.testing.assert_close(factors.norm, reference.norm)
    torch.testing.assert_close(factors.error, _slice_errors(matrix, groups, factors), rtol=1e-6, atol=1e-12 * scale)
    assert bool((factors.error <= (1 + torch_backend.TOLERANCE) * reference.error + 1e-12 * scale).all())


@pytest.mark.parametrize(("rows", "cols"), [slow(300, 420), (420, 300), slow(300, 300)])
@pytest.mark.parametrize("implementation", ["core", "torch"])
def test_sketch_meets_its_certificate(rows, cols, implementation):
    matrix = torch.cat([_decaying(rows, cols, seed) for seed in (0, 1)])
    optimum = linalg.optimal_errors(spectra_ref(matrix, [1])[0], 10).flatten()
    if implementation == "core":
        factors = linalg.batched_rsvd([matrix], [1], [10], [optimum])[0]
    else:
        factors = rsvd_torch(matrix, 1, 10, optimum, 0)
    assert bool((factors.iterations > 0).all())
    assert bool((factors.error <= (1 + 1e-3) * optimum).all())
    torch.testing.assert_close(factors.error, _slice_errors(matrix, 1, factors), rtol=1e-6, atol=0)


@pytest.mark.parametrize("implementation", ["core", "torch"])
def test_a_certificate_that_cannot_be_met_falls_back_to_exact_and_says_so(implementation):
    matrix = _matrix(1, 200, 200)
    impossible = torch.zeros(1, dtype=torch.float64)
    if implementation == "core":
        factors = linalg.batched_rsvd([matrix], [1], [4], [impossible])[0]
    else:
        factors = rsvd_torch(matrix, 1, 4, impossible, 0)
    assert factors.iterations.tolist() == [torch_backend.EXACT_BY_FALLBACK]
    torch.testing.assert_close(factors.error, batched_rsvd_ref(matrix, 1, 4).error)


@pytest.mark.parametrize(
    ("rows", "groups", "cols"), [(96, 1, 200), (200, 2, 192), (33, 3, 99), (17, 1, 5), (300, 1, 300)]
)
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e17])
def test_float32_slices_meet_their_certificate_and_report_their_error(rows, groups, cols, scale):
    """Squares of such weights leave the range of float32; the least error is far above its rounding."""
    matrix = _matrix(2, rows, cols, torch.float32) * scale
    rank = max(1, min(rows, cols // groups) // 3)
    optimum = batched_rsvd_ref(matrix, groups, rank).error
    factors = linalg.batched_rsvd([matrix], [groups], [rank])[0]
    full = linalg.batched_rsvd([matrix], [groups], [rank], exact=True)[0]
    assert bool((factors.error <= (1 + torch_backend.TOLERANCE) * optimum).all())
    torch.testing.assert_close(factors.error, _slice_errors(matrix, groups, factors), rtol=2e-6, atol=0)
    torch.testing.assert_close(full.error, optimum, rtol=1e-10, atol=0)


@pytest.mark.parametrize("rank", [4, 60])
def test_float64_takes_over_where_float32_cannot_meet_the_certificate(rank):
    matrix = _matrix(1, 120, 150, torch.float32)
    optimum = batched_rsvd_ref(matrix, 1, rank).error
    factors = linalg.batched_rsvd([matrix], [1], [rank], [0.99 * optimum])[0]  # nothing reaches it
    torch.testing.assert_close(factors.error, optimum, rtol=1e-10, atol=0)


@pytest.mark.parametrize("rank", [60, 90])
def test_errors_near_the_rounding_of_float32_are_those_of_float64(rank):
    """Singular values to 1e-3: the squares left over are 1e-4 to 1e-6 of all."""
    matrix = _decaying(100, 130).float()
    optimum = batched_rsvd_ref(matrix, 1, rank).error
    factors = linalg.batched_rsvd([matrix], [1], [rank])[0]
    torch.testing.assert_close(factors.error, optimum, rtol=1e-9, atol=0)


def test_float32_values_near_its_largest_and_least():
    """Products of such values overflow, their projections are larger than the largest float32, or denormal."""
    for matrix, rank, rtol in (
        (_matrix(1, 40, 4000, torch.float32) * 2e37, 20, 1e-5),
        (torch.full((1, 4, 4), 3e38) * torch.tensor([-1.0, 1, 1, 1]).outer(torch.ones(4)), 1, 1e-5),
        (torch.full((1, 6, 5), 3e38).triu(), 2, 1e-5),
        (_matrix(1, 40, 50, torch.float32) * 1e-38, 20, 1e-4),
    ):
        factors = linalg.batched_rsvd([matrix], [1], [rank])[0]
        assert torch.isfinite(factors.left).all() and torch.isfinite(factors.right).all()
        norm = float(matrix.double().square().sum())
        torch.testing.assert_close(factors.error, _slice_errors(matrix, 1, factors), rtol=rtol, atol=1e-10 * norm)


@pytest.mark.parametrize("rank", [1, 17])
def test_float32_sums_of_equal_values_do_not_bend_the_certificate(rank):
    """In float32 such sums are too large by many epsilons, and would make the error less than the least."""
    u, v = (torch.linalg.qr(_matrix(1, 256, 256, seed=seed)[0])[0] for seed in (3, 4))
    values = torch.ones(256, dtype=torch.float64)
    values[:16] = 1.05
    noise = (u * values) @ v
    matrix = torch.zeros(1, 512, 512)
    matrix[0, :256, :256] = 1.1
    matrix[0, 256:, 256:] = (noise * (1.1 * 256 * 0.047 / noise.norm())).float()
    optimum = batched_rsvd_ref(matrix, 1, rank).error
    factors = linalg.batched_rsvd([matrix], [1], [rank])[0]
    assert float(optimum) * (1 - 1e-9) <= float(factors.error) <= (1 + torch_backend.TOLERANCE) * float(optimum)
    torch.testing.assert_close(factors.error, _slice_errors(matrix, 1, factors), rtol=1e-5, atol=0)


def test_values_that_are_not_finite_are_refused():
    for bad in (float("nan"), float("inf"), 1e200):
        matrix = torch.eye(4, dtype=torch.float64)[None].clone()
        matrix[0, 1, 2] = bad
        with pytest.raises(ArgumentError, match="NaN, infinite or too large"):
            linalg.spectra([matrix], [[1]])
        with pytest.raises(ArgumentError, match="NaN, infinite or too large"):
            linalg.batched_rsvd([matrix], [1], [2], [torch.zeros(1, dtype=torch.float64)])


def test_entries_whose_squares_underflow_do_no_harm():
    """Reflectors of nothing but denormal squares."""
    matrix = torch.tensor([[1e-80, 0, 0], [1e-81, 1, 0.5], [1e-81, 0.5, 1]], dtype=torch.float64)[None]
    torch.testing.assert_close(linalg.spectra([matrix], [[1]])[0][0], spectra_ref(matrix, [1])[0], rtol=0, atol=1e-8)
    blocks = _matrix(1, 64, 64)
    blocks[:, :32, 32:], blocks[:, 32:, :32] = 0.0, blocks[:, 32:, :32] * 1e-160
    blocks[:, :32, :32] *= 1e-80
    factors = linalg.batched_rsvd([blocks], [1], [32])[0]
    error = _slice_errors(blocks, 1, factors)
    assert float(error) <= 1e-20 * float(blocks.square().sum())


def test_exact_asks_for_no_sketch():
    factors = linalg.batched_rsvd([_matrix(1, 300, 300)], [1], [4], exact=True)[0]
    assert factors.iterations.tolist() == [torch_backend.EXACT_BY_CHOICE]


def test_rank_close_to_full_is_exact_by_choice():
    factors = linalg.batched_rsvd([_matrix(1, 50, 60)], [1], [40])[0]
    assert factors.iterations.tolist() == [torch_backend.EXACT_BY_CHOICE]


def test_codes_are_those_of_the_core():
    codes = torch_backend.EXACT_BY_CHOICE, torch_backend.EXACT_BY_FALLBACK
    assert codes == (_core.EXACT_BY_CHOICE, _core.EXACT_BY_FALLBACK)


def test_factors_are_balanced():
    """Both factors carry the square root of the singular values."""
    factors = linalg.batched_rsvd([_decaying(30, 40)], [1], [30])[0]
    s = torch.logspace(0, -3, 30, dtype=torch.float64)
    torch.testing.assert_close(factors.left[0].norm(dim=0), s.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(factors.right[0].norm(dim=1), s.sqrt(), rtol=1e-5, atol=0)


def test_rank_deficient_and_zero_matrices():
    low = _matrix(1, 20, 3) @ _matrix(1, 3, 30)
    factors = linalg.batched_rsvd([low], [1], [10])[0]
    torch.testing.assert_close(factors.left @ factors.right, low)
    zero = linalg.batched_rsvd([torch.zeros(1, 4, 6)], [2], [2])[0]
    assert torch.isfinite(zero.left).all() and float((zero.left @ zero.right).abs().max()) == 0.0


def test_seed_changes_the_sketch_only():
    matrix = _decaying(300, 300)
    a, b, c = (linalg.batched_rsvd([matrix], [1], [10], seed=s)[0] for s in (1, 1, 2))
    assert torch.equal(a.left, b.left) and not torch.equal(a.left, c.left)
    torch.testing.assert_close(a.left @ a.right, c.left @ c.right, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("groups", "ranks", "optima", "seed", "message"),
    [
        ([1], [4], None, 0, r"ranks\[0\]: 4 is outside 1\.\.3"),
        ([1], [0], None, 0, r"ranks\[0\]: 0 is outside"),
        ([5], [1], None, 0, r"groups\[0\]: 5 does not divide"),
        ([1], [1], [torch.zeros(2, dtype=torch.float64)], 0, r"optima\[0\]: expected 1 float64"),
        ([1], [1], [torch.zeros(1)], 0, r"optima\[0\]: expected 1 float64"),
        ([1], [1, 1], [torch.zeros(1).double()], 0, r"ranks: 2 entries for 1"),
        ([1], [1], None, -1, r"seed: -1 is negative"),
    ],
)
def test_batched_rsvd_names_the_bad_argument(groups, ranks, optima, seed, message):
    with pytest.raises(ArgumentError, match=message):
        linalg.batched_rsvd([torch.ones(1, 3, 4)], groups, ranks, optima, seed=seed)


# ---------------------------------------------------------------------------------------------- operators


def test_spectra_op_passes_opcheck():
    for dtype in (torch.float32, torch.float64):
        args = ([_matrix(2, 5, 12, dtype), _matrix(1, 8, 6, dtype)], [1, 2, 3, 1], [3, 1])
        torch.library.opcheck(torch.ops.alds_fast.spectra.default, args)


def test_batched_rsvd_op_passes_opcheck():
    matrices = [_matrix(2, 5, 12, torch.float32), _matrix(1, 8, 6)]
    optima = [torch.zeros(6, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    torch.library.opcheck(torch.ops.alds_fast.batched_rsvd.default, (matrices, [3, 1], [2, 4], optima, 0, False))


def test_operators_trace_with_the_right_shapes():
    with torch.device("meta"):
        matrix = torch.empty(2, 5, 12)
    rows = torch.ops.alds_fast.spectra([matrix], [1, 4], [2])
    assert rows[0].shape == (2, 5 + 4 * 3) and rows[0].dtype == torch.float64
    optimum = torch.empty(8, dtype=torch.float64, device="meta")
    left, right, norm, error, iterations = torch.ops.alds_fast.batched_rsvd([matrix], [4], [2], [optimum], 0, False)
    assert (left.shape, right.shape) == ((8, 5, 2), (8, 2, 3))
    assert norm.shape == error.shape == iterations.shape == (8,)


@pytest.mark.slow
def test_spectra_compile_without_graph_breaks():
    def twice(matrix):
        return torch.ops.alds_fast.spectra([matrix], [1, 2], [2])[0] * 2

    matrix = _matrix(1, 4, 6)
    torch.testing.assert_close(torch.compile(twice, fullgraph=True, backend="eager")(matrix), twice(matrix))


@pytest.mark.slow
def test_every_blas_has_one_thread_while_the_core_works():
    code = """
import torch, threadpoolctl, alds_fast
from alds_fast.linalg import cpp_core
alds_fast.analyze(torch.nn.Linear(8, 8))
with cpp_core.one_blas_thread():
    blas = [lib for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"]
assert any("scipy" in lib["filepath"].split("site-packages")[-1].split("/")[1] for lib in blas), blas
print({lib["num_threads"] for lib in blas})"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "{1}", result.stdout + result.stderr
