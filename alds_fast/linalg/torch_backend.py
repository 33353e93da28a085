"""Spectra and randomized SVD of slices in plain torch: what runs on CUDA, and the float64 references of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLE = 8
MAX_ITERATIONS = 24
TOLERANCE = 1e-3  # squared error reached <= (1 + TOLERANCE) * optimum
EXACT_FRACTION = 0.1  # a sketch wider than this share of the order is slower than the exact decomposition (measured)
TINY = 1e-300
MAX_OFF = 2.0**-21
EXACT_BY_CHOICE, EXACT_BY_FALLBACK = -1, -2  # as in csrc/basis.h


class Factors(NamedTuple):
    """Rank-``rank`` factors of the slices of a folded weight, S = batch * groups slices.

    ``left`` (S, rows, rank) and ``right`` (S, rank, cols / groups) in the matrix's dtype, both carrying the square
    root of the singular values; ``norm`` (S,) float64, ||W_g||^2; ``error`` (S,) float64, the exact squared Frobenius
    error ||W_g - left @ right||^2 before rounding to that dtype; ``iterations`` (S,) int64, power iterations used, or
    EXACT_BY_CHOICE / EXACT_BY_FALLBACK.
    """

    left: Tensor
    right: Tensor
    norm: Tensor
    error: Tensor
    iterations: Tensor


def _slices(matrix: Tensor, groups: int) -> Tensor:
    """(batch, groups, rows, cols / groups) view in float64."""
    return matrix.double().unflatten(2, (groups, -1)).transpose(1, 2)


def _gram(slices: Tensor) -> Tensor:
    return slices @ slices.mT if slices.shape[-2] <= slices.shape[-1] else slices.mT @ slices


def _eigenvalues(gram: Tensor, float32: bool) -> Tensor:
    """Eigenvalues of Gram matrices, ascending, >= 0, computed in ``float32`` or not; their sum is the trace then."""
    if not float32:
        return torch.linalg.eigvalsh(gram).clamp_min(0)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    values = torch.linalg.eigvalsh((gram / trace.clamp_min(TINY).unsqueeze(-1)).float()).double().clamp_min(0)
    total = values.sum(-1, keepdim=True)
    missed = ((total - 1).abs() > MAX_OFF) & (trace > 0)  # as in csrc/spectra.cpp: float64 has to do it
    if bool(missed.any()):
        exact = torch.linalg.eigvalsh(gram).clamp_min(0)
        return torch.where(missed, exact, values * (trace / total.clamp_min(TINY)))
    return values * (trace / total.clamp_min(TINY))


def spectra_torch(matrix: Tensor, groups: Sequence[int], float32: bool) -> Tensor:
    """Singular values of the slices for all ``groups``, side by side as the operator has them: (batch, total).

    (Gram matrices are float64 even if ``float32``: a product in float32 may be one in TensorFloat-32.)
    """
    values = [_eigenvalues(_gram(_slices(matrix, k)), float32).sqrt().flip(-1).flatten(1) for k in groups]
    return torch.cat(values, 1) if values else matrix.new_empty((matrix.shape[0], 0), dtype=torch.float64)


def spectra_ref(matrix: Tensor, groups: Sequence[int]) -> list[Tensor]:
    """Float64 reference of :func:`alds_fast.linalg.spectra` for one matrix: a full SVD of every slice."""
    return [torch.linalg.svdvals(_slices(matrix, k)) for k in groups]


def optimal_errors(values: Tensor, rank: int) -> Tensor:
    """Least possible squared Frobenius error of rank ``rank``: sum of s_l^2 over l > rank (Eckart-Young-Mirsky)."""
    return values[..., rank:].square().sum(-1)


def _top_eigenvectors(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Top eigenvectors (S, order, rank), descending, and the energy they capture (S,)."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors[..., -rank:].flip(-1), values[..., -rank:].sum(-1)


def _sketch(gram: Tensor, rank: int, bound: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Randomized subspace iteration on a batch of Gram matrices until trace - captured <= bound, slice by slice."""
    order = gram.shape[-1]
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    generator = torch.Generator(gram.device).manual_seed(seed)
    sketch = torch.randn(len(gram), order, rank + OVERSAMPLE, dtype=gram.dtype, device=gram.device, generator=generator)
    image = gram @ sketch
    basis = gram.new_zeros(len(gram), order, rank)
    error = torch.full_like(total, torch.inf)
    iterations = torch.full_like(total, EXACT_BY_FALLBACK, dtype=torch.int64)
    for step in range(1, MAX_ITERATIONS + 1):
        q = torch.linalg.qr(image)[0]
        image = gram @ q
        rotation, captured = _top_eigenvectors(q.mT @ image, rank)
        lost = (total - captured).clamp_min(0)
        fresh = (lost <= bound) & (iterations == EXACT_BY_FALLBACK)
        basis = torch.where(fresh[:, None, None], q @ rotation, basis)
        error, iterations = torch.where(fresh, lost, error), torch.where(fresh, step, iterations)
        if bool((iterations > 0).all()):
            break
    return basis, error, iterations


def rsvd_torch(matrix: Tensor, groups: int, rank: int, optimum: Tensor, seed: int, exact: bool = False) -> Factors:
    """Randomized SVD of the slices of one matrix, batched by torch's own routines; arguments as the operator's."""
    slices = _slices(matrix, groups).flatten(0, 1)
    gram = _gram(slices)
    order = gram.shape[-1]
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    bound = (1 + TOLERANCE) * optimum.flatten() + order * torch.finfo(torch.float64).eps * total
    if not exact and rank + OVERSAMPLE <= EXACT_FRACTION * order:
        basis, error, iterations = _sketch(gram, rank, bound, seed)
    else:
        basis, error = gram.new_zeros(len(gram), order, rank), torch.zeros_like(total)
        iterations = torch.full_like(total, EXACT_BY_CHOICE, dtype=torch.int64)
    todo = iterations < 0
    if bool(todo.any()):
        vectors, captured = _top_eigenvectors(gram[todo], rank)
        basis[todo], error[todo] = vectors, (total[todo] - captured).clamp_min(0)
    wide = slices.shape[1] <= slices.shape[2]
    left, right = (basis, basis.mT @ slices) if wide else (slices @ basis, basis.mT)
    norms = right.norm(dim=-1) if wide else left.norm(dim=-2)
    scale = torch.where(norms > 0, norms, 1).sqrt()
    up, down = (scale, 1 / scale) if wide else (1 / scale, scale)
    left, right = (left * up[:, None]).to(matrix.dtype), (right * down[..., None]).to(matrix.dtype)
    return Factors(left, right, total, error, iterations)


def batched_rsvd_ref(matrix: Tensor, groups: int, rank: int) -> Factors:
    """Float64 reference of :func:`alds_fast.linalg.batched_rsvd` for one matrix: a full SVD of every slice."""
    slices = _slices(matrix, groups).flatten(0, 1)
    u, s, vh = torch.linalg.svd(slices, full_matrices=False)
    root = s[:, :rank].sqrt()
    exact = torch.full((len(slices),), EXACT_BY_CHOICE, device=matrix.device)
    left, right = u[..., :rank] * root[:, None], vh[:, :rank] * root[..., None]
    return Factors(left, right, optimal_errors(s, 0), optimal_errors(s, rank), exact)


def cholesky_in_place(matrices: Tensor) -> Tensor:
    """Symmetric positive matrices (batch, n, n) become upper triangles R with R^T R = A, in their own memory.

    torch.linalg.LinAlgError where one is not positive; what is left of the matrices is then of no use.
    """
    for one in matrices.mT:  # whose columns lie together, as LAPACK has them: torch then makes no copy
        torch.linalg.cholesky(one, out=one)
    return matrices


def solve_each(systems: Tensor, right: Tensor) -> Tensor:
    """X with ``X @ systems == right``: (batch, n, n) and (batch, m, n) to (batch, m, n).

    One system at a time: batched LU of torch 2.13's MKL returns nonsense, or nothing, with two threads.
    """
    pairs = zip(systems, right, strict=True)
    return torch.stack([torch.linalg.solve(system, rows, left=False) for system, rows in pairs])
