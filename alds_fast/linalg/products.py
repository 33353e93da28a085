"""Low-rank products, cut to a smaller rank without the matrix that they stand for.

With QR factorisations of both factors, L = Q_1 R_1 and R^T = Q_2 R_2, the product L R = Q_1 (R_1 R_2^T) Q_2^T has the
singular values of a matrix as small as its rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CutProduct(NamedTuple):
    """Factors of a smaller rank, left (..., rows, rank), right (..., rank, columns), and the relative error."""

    left: Tensor
    right: Tensor
    error: float


def product_values(left: Tensor, right: Tensor) -> Tensor:
    """Singular values of left @ right, as many as its inner size, descending, float64 on the CPU.

    >>> product_values(torch.eye(4, 2), torch.eye(2, 3))
    tensor([1., 1.], dtype=torch.float64)
    """
    first, second = (torch.linalg.qr(f.double(), mode="r").R for f in (left, right.mT))
    return torch.linalg.svdvals(first @ second.mT).cpu()


def cut_product(left: Tensor, right: Tensor, rank: int) -> CutProduct:
    """The best factors of that rank of the slices left @ right, (..., rows, r) and (..., r, columns), in float64."""
    (q1, r1), (q2, r2) = torch.linalg.qr(left.double()), torch.linalg.qr(right.double().mT)
    u, s, vh = torch.linalg.svd(r1 @ r2.mT, full_matrices=False)
    norm, lost = float(s.norm()), float(s[..., rank:].norm())
    cut = q1 @ u[..., :rank], s[..., :rank, None] * (vh[..., :rank, :] @ q2.mT)
    return CutProduct(*cut, lost / norm if norm > 0 else 0.0)
