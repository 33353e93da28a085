"""Batched spectra of channel slices, as a ``torch.library`` operator.

On the CPU it runs in the C++ core (``alds_fast.linalg._core``), one LAPACK call per thread and
``torch.get_num_threads()`` threads; on CUDA it runs torch's batched routines (:mod:`alds_fast.linalg.torch_backend`,
which also holds the float64 references). Spectra are those of Gram matrices in float64, so singular values are resolved
down to about 1e-8 of the largest one, whatever the weight's type; or, if asked for, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError
from .cpp_core import arrays, check_matrices, core, implementation, one_blas_thread, refusals
from .torch_backend import spectra_torch


def _unflatten(values: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    if sum(counts) != len(values) or any(c < 0 for c in counts):
        raise ArgumentError(f"counts: {list(counts)} does not add up to the {len(values)} entries of groups")
    rest = iter(values)
    return [[next(rest) for _ in range(c)] for c in counts]


def _row_size(matrix: Tensor, groups: Sequence[int]) -> int:
    return sum(k * min(matrix.shape[1], matrix.shape[2] // k) for k in groups)


def _spectra_cpu(
    matrices: Sequence[Tensor], groups: Sequence[int], counts: Sequence[int], float32: bool = False
) -> list[Tensor]:
    per_matrix = _unflatten(groups, counts)
    check_matrices(matrices, per_matrix)
    with one_blas_thread(), refusals():
        rows = core().spectra(arrays(matrices), per_matrix, float32, torch.get_num_threads())
    return [torch.from_numpy(r) for r in rows]


_spectra_op = torch.library.custom_op("alds_fast::spectra", _spectra_cpu, mutates_args=(), device_types="cpu")


@_spectra_op.register_fake
def _spectra_fake(
    matrices: Sequence[Tensor], groups: Sequence[int], counts: Sequence[int], float32: bool = False
) -> list[Tensor]:
    per_matrix = _unflatten(groups, counts)
    check_matrices(matrices, per_matrix)
    return [
        m.new_empty((m.shape[0], _row_size(m, ks)), dtype=torch.float64)
        for m, ks in zip(matrices, per_matrix, strict=True)
    ]


def _spectra_cuda(
    matrices: Sequence[Tensor], groups: Sequence[int], counts: Sequence[int], float32: bool = False
) -> list[Tensor]:
    per_matrix = _unflatten(groups, counts)
    check_matrices(matrices, per_matrix)
    return [spectra_torch(m, ks, float32) for m, ks in zip(matrices, per_matrix, strict=True)]


_spectra_op.register_kernel("cuda")(_spectra_cuda)


def spectra(
    matrices: Sequence[Tensor], groups: Sequence[Sequence[int]], *, float32: bool = False
) -> list[list[Tensor]]:
    """Singular values of all channel slices of folded weights, for all candidate ``groups``.

    Args:
        matrices: folded weights, each (batch, rows, cols), float32 or float64, CPU or CUDA.
        groups: for every matrix, the slice counts; each divides cols.
        float32: compute in float32, about twice as fast; squared norms of the slices are right to float64 all the same.

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
    rows = run(list(matrices), flat, [len(ks) for ks in groups], float32) if len(matrices) else []
    results = []
    for m, ks, row in zip(matrices, groups, rows, strict=True):
        sizes = [k * min(m.shape[1], m.shape[2] // k) for k in ks]
        results.append([p.unflatten(1, (k, -1)) for k, p in zip(ks, row.split(sizes, 1), strict=True)])
    return results
