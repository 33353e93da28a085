"""Randomized SVD of channel slices with a certificate, as a ``torch.library`` operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError
from .cpp_core import arrays, check_matrices, core, implementation, one_blas_thread, refusals
from .spectra_op import spectra
from .torch_backend import EXACT_FRACTION, MAX_ITERATIONS, OVERSAMPLE, TOLERANCE, Factors, optimal_errors, rsvd_torch


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
        columns = core().batched_rsvd(
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
