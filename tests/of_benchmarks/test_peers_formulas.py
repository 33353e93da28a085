"""The peers' closed forms: the error that their theory states, and that nothing near is better by their own measure."""

import pytest
import torch

from benchmarks.quality.peers import formulas

M, N, ROWS, RANK = 9, 7, 60, 3


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


WEIGHT = normal(M, N)
X = normal(ROWS, N, seed=1) @ normal(N, N, seed=2)
SEEN = X + 0.3 * normal(ROWS, N, seed=3)  # what reaches the layer in a compressed network
SECOND, CROSS, SECOND_SEEN = X.T @ X / ROWS, X.T @ SEEN / ROWS, SEEN.T @ SEEN / ROWS
FISHER, SIZES = normal(M, seed=4).square(), X.abs().mean(0)


def output_error(made, seen=X):
    """E|W x - W' x'|^2."""
    return float((X @ WEIGHT.T - seen @ made.T).square().sum() / ROWS)


def lost(matrix):
    return float(torch.linalg.svdvals(matrix)[RANK:].square().sum())


CASES = {  # factors, their measure, what the theory says of it
    "whitened": (
        formulas.whitened(WEIGHT, SECOND, RANK), output_error, lost(WEIGHT @ torch.linalg.cholesky(SECOND)),
    ),
    "from outputs": (
        formulas.from_outputs(WEIGHT, SECOND, RANK), output_error,
        float(torch.linalg.eigvalsh(WEIGHT @ SECOND @ WEIGHT.T)[:-RANK].sum()),
    ),
    "scaled": (
        formulas.scaled(WEIGHT, SIZES, RANK), lambda made: float(((WEIGHT - made) * SIZES.sqrt()).square().sum()),
        lost(WEIGHT * SIZES.sqrt()),
    ),
    "row weighted": (
        formulas.row_weighted(WEIGHT, FISHER, RANK),
        lambda made: float((FISHER.unsqueeze(1) * (WEIGHT - made).square()).sum()),
        lost(FISHER.sqrt().unsqueeze(1) * WEIGHT),
    ),
    "anchored": (
        formulas.anchored(WEIGHT, CROSS, SECOND_SEEN, RANK), lambda made: output_error(made, SEEN),
        output_error(WEIGHT @ CROSS @ torch.linalg.inv(SECOND_SEEN), SEEN)
        + lost(WEIGHT @ CROSS @ torch.linalg.inv(torch.linalg.cholesky(SECOND_SEEN)).T),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_error_is_that_of_the_theory(name):
    (left, right), measure, stated = CASES[name]
    assert left.shape == (M, RANK) and right.shape == (RANK, N)
    assert measure(left @ right) == pytest.approx(stated, rel=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_nothing_near_of_the_same_rank_is_better(name):
    (left, right), measure, _ = CASES[name]
    best = measure(left @ right)
    for seed in range(40):
        step = 10.0 ** -(seed % 4) / 10
        near = (left + step * normal(M, RANK, seed=seed + 10)) @ (right + step * normal(RANK, N, seed=seed + 90))
        assert measure(near) > best


def test_swift_svd_is_whitened_svd():
    made = [left @ right for left, right in (CASES["whitened"][0], CASES["from outputs"][0])]
    torch.testing.assert_close(*made, rtol=1e-9, atol=1e-9)


def test_the_update_satisfies_its_normal_equations():
    """(W E[x x'^T] - U V E[x' x'^T]) V^T = 0, and the error falls."""
    left, right = CASES["whitened"][0]
    new, same = formulas.updated(WEIGHT, CROSS, SECOND_SEEN, right)
    assert same is right
    residual = (WEIGHT @ CROSS - new @ right @ SECOND_SEEN) @ right.T
    assert float(residual.abs().max()) < 1e-10 * float((WEIGHT @ CROSS @ right.T).abs().max())
    assert output_error(new @ right, SEEN) < output_error(left @ right, SEEN)
    assert output_error(new @ right, SEEN) > CASES["anchored"][1](torch.mm(*CASES["anchored"][0]))


def test_the_update_on_the_same_inputs_changes_nothing():
    left, right = CASES["whitened"][0]
    torch.testing.assert_close(formulas.updated(WEIGHT, SECOND, SECOND, right)[0], left)


def test_singular_moments_have_a_factor():
    few = X[:4]
    left, right = formulas.whitened(WEIGHT, few.T @ few, 5)
    torch.testing.assert_close(few @ (left @ right).T, few @ WEIGHT.T, rtol=1e-4, atol=1e-4)
