"""Batched spectra and randomized SVD of channel slices, as ``torch.library`` operators.

On CPU both run in the C++ core (``alds_fast._core``), one LAPACK call per thread and ``torch.get_num_threads()``
threads; on CUDA they run torch's batched routines (:mod:`alds_fast.linalg.torch_backend`, which also holds the float64
references). Spectra are those of Gram matrices in float64, so singular values are resolved down to about 1e-8 of the
largest one, whatever the weight's type; or, if asked for, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError
from . import _core  # type: ignore[attr-defined]
from .cpp_core import arrays, check_matrices, implementation, one_blas_thread, refusals
from .torch_backend import (
    EXACT_BY_CHOICE,
    EXACT_BY_FALLBACK,
    EXACT_FRACTION,
    MAX_ITERATIONS,
    OVERSAMPLE,
    TOLERANCE,
    Factors,
    optimal_errors,
    rsvd_torch,
    spectra_torch,
)

__all__ = ["EXACT_BY_CHOICE", "EXACT_BY_FALLBACK", "TOLERANCE", "Factors", "batched_rsvd", "optimal_errors", "spectra"]


def _unflatten(values: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    if sum(counts) != len(values) or any(c < 0 for c in counts):
        raise ArgumentError(f"counts: {list(counts)} does not add up to the {len(values)} entries of groups")
    rest = iter(values)
    return [[next(rest) for _ in range(c)] for c in counts]


def _row_size(matrix: Tensor, groups: Sequence[int]) -> int:
    return sum(k * min(matrix.shape[1], matrix.shape[2] // k) for k in groups)


# --------------------------------------------------------------------------------------------------- spectra


def _spectra_cpu(
    matrices: Sequence[Tensor], groups: Sequence[int], counts: Sequence[int], single: bool = False
) -> list[Tensor]:
    per_matrix = _unflatten(groups, counts)
    check_matrices(matrices, per_matrix)
    with one_blas_thread(), refusals():
        rows = _core.spectra(arrays(matrices), per_matrix, single, torch.get_num_threads())
    return [torch.from_numpy(r) for r in rows]


_spectra_op = torch.library.custom_op("alds_fast::spectra", _spectra_cpu, mutates_args=(), device_types="cpu")


@_spectra_op.register_fake
def _spectra_fake(
    matrices: Sequence[Tensor], groups: Sequence[int], counts: Sequence[int], single: bool = False
) -> list[Tensor]:
    per_matrix = _unflatten(groups, counts)
    check_matrices(matrices, per_matrix)
    return [
        m.new_empty((m.shape[0], _row_size(m, ks)), dtype=torch.float64)
        for m, ks in zip(matrices, per_matrix, strict=True)
    ]


def _spectra_cuda(
    matrices: Sequence[Tensor], groups: Sequence[int], counts: Sequence[int], single: bool = False
) -> list[Tensor]:
    per_matrix = _unflatten(groups, counts)
    check_matrices(matrices, per_matrix)
    return [spectra_torch(m, ks, single) for m, ks in zip(matrices, per_matrix, strict=True)]


_spectra_op.register_kernel("cuda")(_spectra_cuda)


def spectra(matrices: Sequence[Tensor], groups: Sequence[Sequence[int]], *, single: bool = False) -> list[list[Tensor]]:
    """Singular values of all channel slices of folded weights, for all candidate ``groups``.

    Args:
        matrices: folded weights, each (batch, rows, cols), float32 or float64, CPU or CUDA.
        groups: for every matrix, the slice counts; each divides cols.
        single: compute in float32, about twice as fast; squared norms of the slices are right to float64 all the same.

    Returns:
        For every matrix and every k of its ``groups`` a float64 tensor (batch, k, min(rows, cols / k)), descending.

    Raises:
        ArgumentError: an argument has the wrong shape, dtype or length, or k does not divide cols.

    The smaller Gram matrix of each slice is used: W W^T (those of finer slices add up to the coarser one's) or W^T W
    (those of finer slices are its diagonal blocks), so a few products serve every k. Values are resolved to 1e-8 of
    the largest; in float32 ``VALUE`` and ``TAIL`` of :mod:`alds_fast.allocation.float32_check` say how well.

    >>> w = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    >>> spectra([w], [[1, 2]])[0]
    [tensor([[[4., 3.]]], dtype=torch.float64), tensor([[[3.],
             [4.]]], dtype=torch.float64)]
    """
    flat = [k for ks in groups for k in ks]
    run = implementation(matrices, _spectra_op, {"cpu": _spectra_cpu, "cuda": _spectra_cuda})
    rows = run(list(matrices), flat, [len(ks) for ks in groups], single) if len(matrices) else []
    results = []
    for m, ks, row in zip(matrices, groups, rows, strict=True):
        sizes = [k * min(m.shape[1], m.shape[2] // k) for k in ks]
        results.append([p.unflatten(1, (k, -1)) for k, p in zip(ks, row.split(sizes, 1), strict=True)])
    return results


# ---------------------------------------------------------------------------------------------- batched_rsvd


def _check_rsvd(
    matrices: Sequence[Tensor], groups: Sequence[int], ranks: Sequence[int], optima: Sequence[Tensor], seed: int
) -> None:
    if seed < 0:
        raise ArgumentError(f"seed: {seed} is negative")
    check_matrices(matrices, [[k] for k in groups])
    for name, values in (("ranks", ranks), ("optima", optima)):
        if len(values) != len(matrices):
            raise ArgumentError(f"{name}: {len(values)} entries for {len(matrices)} matrices")
    for i, (m, k, rank, optimum) in enumerate(zip(matrices, groups, ranks, optima, strict=True)):
        full = min(m.shape[1], m.shape[2] // k)
        if not 1 <= rank <= full:
            raise ArgumentError(f"ranks[{i}]: {rank} is outside 1..{full}")
        if optimum.dtype != torch.float64 or optimum.numel() != m.shape[0] * k:
            raise ArgumentError(f"optima[{i}]: expected {m.shape[0] * k} float64 values, one per slice")


def _rsvd_cpu(
    matrices: Sequence[Tensor],
    groups: Sequence[int],
    ranks: Sequence[int],
    optima: Sequence[Tensor],
    seed: int,
    exact: bool,
) -> list[Tensor]:
    _check_rsvd(matrices, groups, ranks, optima, seed)
    with one_blas_thread(), refusals():
        columns = _core.batched_rsvd(
            arrays(matrices), list(groups), list(ranks), arrays(optima), seed,
            OVERSAMPLE, MAX_ITERATIONS, TOLERANCE, 0.0 if exact else EXACT_FRACTION, torch.get_num_threads(),
        )  # fmt: skip
    return [torch.from_numpy(a) for row in zip(*columns, strict=True) for a in row]


_rsvd_op = torch.library.custom_op("alds_fast::batched_rsvd", _rsvd_cpu, mutates_args=(), device_types="cpu")


@_rsvd_op.register_fake
def _rsvd_fake(
    matrices: Sequence[Tensor],
    groups: Sequence[int],
    ranks: Sequence[int],
    optima: Sequence[Tensor],
    seed: int,
    exact: bool,
) -> list[Tensor]:
    _check_rsvd(matrices, groups, ranks, optima, seed)
    out = []
    for m, k, rank in zip(matrices, groups, ranks, strict=True):
        s = m.shape[0] * k
        out += [m.new_empty((s, m.shape[1], rank)), m.new_empty((s, rank, m.shape[2] // k))]
        out += [m.new_empty(s, dtype=torch.float64), m.new_empty(s, dtype=torch.float64)]
        out += [m.new_empty(s, dtype=torch.int64)]
    return out


def _rsvd_cuda(
    matrices: Sequence[Tensor],
    groups: Sequence[int],
    ranks: Sequence[int],
    optima: Sequence[Tensor],
    seed: int,
    exact: bool,
) -> list[Tensor]:
    _check_rsvd(matrices, groups, ranks, optima, seed)
    rows = zip(matrices, groups, ranks, optima, strict=True)
    return [t for m, k, rank, optimum in rows for t in rsvd_torch(m, k, rank, optimum, seed, exact)]


_rsvd_op.register_kernel("cuda")(_rsvd_cuda)


def batched_rsvd(
    matrices: Sequence[Tensor],
    groups: Sequence[int],
    ranks: Sequence[int],
    optima: Sequence[Tensor] | None = None,
    *,
    seed: int = 0,
    exact: bool = False,
) -> list[Factors]:
    """Best rank-``ranks[i]`` factors of every channel slice of every folded weight, with a certificate.

    Args:
        matrices: folded weights, each (batch, rows, cols), float32 or float64, CPU or CUDA.
        groups: slice count of each matrix; divides cols.
        ranks: rank of each matrix, in 1..min(rows, cols / groups).
        optima: for each matrix the least possible squared errors of its slices, batch * groups float64 values, from
            :func:`optimal_errors` of its spectrum; computed here if None.
        exact: no sketches, and float64. (The certificate is on the Frobenius norm; the operator norm of a sketch's
            error may be larger.)
        seed: of the sketch, non-negative. The CPU result is bit-identical for any number of threads.

    Returns:
        One :class:`Factors` per matrix.

    Raises:
        ArgumentError: an argument has the wrong shape, dtype, length or range.

    A sketch of ``rank + 8`` columns is refined by power iterations on the Gram matrix until ||W||^2 - ||Q^T W||^2,
    the exact squared error, is within ``1 + 1e-3`` of the optimum; where that is not met in 24 iterations, or the
    sketch would be so wide that it costs more, the exact eigendecomposition runs and ``iterations`` says so. Source:
    Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011).

    On CPU the bases of float32 slices with errors above 3.1 % are computed in float32, their projections and the
    certificate in float64; if it is not met, the basis is computed in float64 too. ``exact`` is float64.
    """
    if optima is None:
        values = spectra(matrices, [[k] for k in groups])
        optima = [optimal_errors(v[0], rank) for v, rank in zip(values, ranks, strict=True)]
    if not len(matrices):
        return []
    run = implementation(matrices, _rsvd_op, {"cpu": _rsvd_cpu, "cuda": _rsvd_cuda})
    flat = run(list(matrices), list(groups), list(ranks), list(optima), seed, exact)
    width = len(Factors._fields)
    return [Factors(*flat[i : i + width]) for i in range(0, len(flat), width)]
