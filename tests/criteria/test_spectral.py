"""Every bound holds against the true norms in float64, and is tight where its theorem says so."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alds_fast import linalg
from alds_fast.criteria import CRITERIA, WEIGHT_CRITERIA, spectral


def _truncated(matrix, groups, rank):
    """E = W - W_hat for one matrix, by a plain SVD of every slice."""
    slices = matrix.unflatten(1, (groups, -1)).transpose(0, 1)
    u, s, vh = torch.linalg.svd(slices, full_matrices=False)
    kept = (u[..., :rank] * s[:, None, :rank]) @ vh[:, :rank]
    return matrix - kept.transpose(0, 1).flatten(1)


def _tables(matrix, groups):
    values = linalg.spectra([matrix[None]], [[groups]])[0][0]
    top = float(torch.linalg.svdvals(matrix)[0])
    return {name: CRITERIA[name].rule(values, top) for name in WEIGHT_CRITERIA}


@st.composite
def problems(draw):
    groups, width, rows = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 6)), draw(st.integers(1, 12))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    matrix = torch.randn(rows, groups * width, generator=g, dtype=torch.float64)
    return matrix, groups, draw(st.integers(0, min(rows, width)))


@given(problems())
def test_frobenius_is_exact_and_the_others_bound_the_operator_norm(problem):
    matrix, groups, rank = problem
    error, tables = _truncated(matrix, groups, rank), _tables(matrix, groups)
    frobenius = float(error.norm() / matrix.norm())
    operator = float(torch.linalg.matrix_norm(error, 2) / torch.linalg.matrix_norm(matrix, 2))
    assert float(tables["frobenius"][rank]) == pytest.approx(frobenius, abs=1e-7)
    assert float(tables["operator"][rank]) >= operator - 1e-7
    assert float(tables["paper"][rank]) >= float(tables["operator"][rank]) - 1e-12
    if groups == 1:
        for name in ("operator", "paper", "reference"):
            assert float(tables[name][rank]) == pytest.approx(operator, abs=1e-7)


@given(problems())
def test_every_table_falls_to_zero(problem):
    matrix, groups, _ = problem
    for table in _tables(matrix, groups).values():
        assert bool((table.diff() <= 1e-15).all()) and float(table[-1]) == 0.0


def test_operator_and_paper_bounds_are_attained_for_several_slices():
    """Identical slices: their errors add up in phase, so both bounds are equalities."""
    block = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = block.repeat(1, 3)
    error = torch.linalg.matrix_norm(_truncated(matrix, 3, 2), 2) / torch.linalg.matrix_norm(matrix, 2)
    tables = _tables(matrix, 3)
    assert float(tables["operator"][2]) == pytest.approx(float(error), rel=1e-6)
    assert float(tables["paper"][2]) == pytest.approx(float(error), rel=1e-6)


def test_reference_is_not_a_bound():
    """What torchprune computes is a factor sqrt(groups) below the true error here."""
    block = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = block.repeat(1, 4)
    error = float(torch.linalg.matrix_norm(_truncated(matrix, 4, 2), 2) / torch.linalg.matrix_norm(matrix, 2))
    claimed = float(_tables(matrix, 4)["reference"][2])
    assert error == pytest.approx(2 * claimed, rel=1e-6)


def test_grouped_layers_are_block_diagonal():
    blocks = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = torch.block_diag(*blocks)
    values = linalg.spectra([blocks], [[2]])[0][0]
    top = float(torch.linalg.svdvals(whole)[0])
    error = torch.block_diag(*[_truncated(b, 2, 2) for b in blocks])
    assert float(spectral.frobenius(values, top)[2]) == pytest.approx(float(error.norm() / whole.norm()), abs=1e-9)
    assert float(spectral.operator(values, top)[2]) >= float(torch.linalg.matrix_norm(error, 2)) / top - 1e-9
    single = linalg.spectra([blocks], [[1]])[0][0]
    exact = torch.block_diag(*[_truncated(b, 1, 2) for b in blocks])
    norm = float(torch.linalg.matrix_norm(exact, 2)) / top
    assert float(spectral.operator(single, top)[2]) == pytest.approx(norm, abs=1e-9)


@pytest.mark.parametrize("name", WEIGHT_CRITERIA)
def test_zero_weights_have_no_error(name):
    assert torch.equal(CRITERIA[name].rule(torch.zeros(1, 2, 3).double(), 0.0), torch.zeros(4, dtype=torch.float64))
