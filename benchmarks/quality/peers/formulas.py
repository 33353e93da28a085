"""The factors that each of the peers gives one weight, in closed form.

``weight`` is W (m, n) of y = W x, ``second`` is E[x x^T], all in float64. What is returned is (left, right), (m, r) and
(r, n), W' = left right.
"""

from __future__ import annotations

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
LEAST = 1e-6  # of the largest scale, which no column or row is scaled by less than
RIDGE = 1e-12  # of the mean of the diagonal: what is added first where a moment has no Cholesky factor


def truncated(matrix: Tensor, rank: int) -> Factors:
    """The nearest matrix of that rank (Eckart-Young-Mirsky); both factors have the roots of the singular values."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots.unsqueeze(1) * right[:rank]


def cholesky(moment: Tensor) -> Tensor:
    """L, lower, L L^T = moment; of a singular one plus 1e-12, 1e-11, ... of its mean diagonal, the first that does."""
    factor, info = torch.linalg.cholesky_ex(moment)
    ridge = RIDGE * moment.diagonal().mean()
    while info.item():
        factor, info = torch.linalg.cholesky_ex(moment + torch.diag(ridge.expand(len(moment))))
        ridge = 10 * ridge
    return factor


def without(root: Tensor, right: Tensor) -> Tensor:
    """right L^-1."""
    return torch.linalg.solve_triangular(root, right, upper=False, left=False)


def whitened(weight: Tensor, second: Tensor, rank: int) -> Factors:
    """SVD-LLM: min E|W x - W' x|^2 = |(W - W') L|^2, L L^T = E[x x^T]; so W' = [W L]_r L^-1.

    Wang, Zheng, Wan, Zhang, "SVD-LLM: truncation-aware singular value decomposition for large language model
    compression", ICLR 2025, arXiv 2403.12607, section 3.1. The lost energy is the sum of the squares of the singular
    values of W L beyond the r-th.
    """
    root = cholesky(second)
    left, right = truncated(weight @ root, rank)
    return left, without(root, right)


def updated(weight: Tensor, cross: Tensor, second: Tensor, right: Tensor) -> Factors:
    """SVD-LLM's update: for a given V = right the U that is best on the compressed network's inputs x'.

    min_U E|W x - U V x'|^2, so U = W E[x x'^T] V^T (V E[x' x'^T] V^T)^-1; the same source, its closed-form update.
    ``cross`` is E[x x'^T], ``second`` E[x' x'^T]. The target is the dense network's output W x. The authors' code takes
    W x' instead, which is this function with ``cross=second``.
    """
    inner = cholesky(right @ second @ right.T)
    return torch.cholesky_solve(right @ cross.T @ weight.T, inner).T, right


def anchored(weight: Tensor, cross: Tensor, second: Tensor, rank: int) -> Factors:
    """AA-SVD: min E|W x - W' x'|^2 over all W' of that rank, x of the dense and x' of the compressed network.

    With L L^T = E[x' x'^T] that is |W E[x x'^T] L^-T - W' L|^2 and what no W' changes; so
    W' = [W E[x x'^T] L^-T]_r L^-1. Sinha and Fleuret, "AA-SVD: anchored and adaptive SVD for large language model
    compression", arXiv 2604.02119, section 3. ``cross`` is E[x x'^T], ``second`` E[x' x'^T].
    """
    root = cholesky(second)
    target = torch.linalg.solve_triangular(root, (weight @ cross).T, upper=False).T
    left, right = truncated(target, rank)
    return left, without(root, right)


def scaled(weight: Tensor, sizes: Tensor, rank: int, alpha: float = 0.5) -> Factors:
    """ASVD: W' = [W S]_r S^-1, S = diag(s), s_j = E|x_j|^alpha as (E|x_j|)^alpha.

    Yuan, Shang, Song, Wu, Yan, Sun, "ASVD: activation-aware singular value decomposition for compressing large language
    models", arXiv 2312.05821, section 3.2; alpha = 0.5 is theirs. ``sizes``: E|x_j|, (n,).
    """
    scale = sizes.clamp_min(LEAST * sizes.max()) ** alpha
    left, right = truncated(weight * scale, rank)
    return left, right / scale


def row_weighted(weight: Tensor, fisher: Tensor, rank: int) -> Factors:
    """FWSVD: min |D (W - W')|, D = diag(d), d_i the root of the sum of row i of the Fisher information; D^-1 [D W]_r.

    Hsu, Hua, Chang, Lou, Shen, Jin, "Language model compression with weighted low-rank factorization", ICLR 2022,
    arXiv 2207.00112, section 3.2. ``fisher``: sum_j E[(dLoss/dW_ij)^2], (m,), a row being an output of the layer.
    """
    scale = fisher.sqrt()
    scale = scale.clamp_min(LEAST * scale.max()).unsqueeze(1)
    left, right = truncated(scale * weight, rank)
    return left / scale, right


def from_outputs(weight: Tensor, second: Tensor, rank: int) -> Factors:
    """Swift-SVD: W' = V V^T W, V the first eigenvectors of the outputs' moment E[y y^T] = W E[x x^T] W^T.

    Qi et al., "Swift-SVD: theoretical optimality meets practical efficiency in low-rank LLM compression",
    arXiv 2604.01609. It is the optimum of :func:`whitened`, without a Cholesky factor of the inputs' moment.
    """
    vectors = torch.linalg.eigh(weight @ second @ weight.T)[1][:, -rank:]
    return vectors, vectors.T @ weight
