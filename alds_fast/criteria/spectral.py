"""Relative errors of a sliced truncation, one function per criterion.

W = [W_1 ... W_k] by channel slices, E = W - W_hat after every slice is cut to rank j, s_{g,l} the l-th singular value
of slice g. Every function takes ``values`` (conv_groups, groups, r) float64, descending, as
:func:`alds_fast.linalg.spectra` gives them, and ``top``, the largest singular value of the folded weight; it returns
the errors for j = 0..r, (r + 1,) float64, non-increasing in j and 0 at j = r. A layer with conv_groups > 1 is a
block-diagonal W: Frobenius norms add up in squares, operator norms are the largest over its blocks. For W = 0 every
error is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _next_values(values: Tensor) -> Tensor:
    """s_{g,j+1} for j = 0..r, with 0 past the end."""
    return torch.cat([values, values.new_zeros(*values.shape[:-1], 1)], -1)


def _relative(absolute: Tensor, norm: float | Tensor) -> Tensor:
    norm = torch.as_tensor(norm, dtype=absolute.dtype, device=absolute.device)
    return torch.where(norm > 0, absolute / norm, torch.zeros_like(absolute))


def frobenius(values: Tensor, top: float) -> Tensor:
    """EXACT: ||E||_F / ||W||_F = sqrt(sum_g sum_{l>j} s_{g,l}^2) / ||W||_F.

    Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1 (1936), slice by
    slice.

    >>> frobenius(torch.tensor([[[4.0, 3.0]]], dtype=torch.float64), 4.0)
    tensor([1.0000, 0.6000, 0.0000], dtype=torch.float64)
    """
    squares = _next_values(values).square().flatten(0, -2).sum(0)
    tails = squares.flip(0).cumsum(0).flip(0)
    return _relative(tails.sqrt(), tails[0].sqrt())


def operator(values: Tensor, top: float) -> Tensor:
    """Upper bound of ||E||_2 / ||W||_2: sqrt(sum_g s_{g,j+1}^2) / s_1(W); equality for groups = 1.

    ||[E_1 ... E_k]||_2^2 = ||sum_g E_g E_g^T||_2 <= sum_g ||E_g||_2^2, and ||E_g||_2 = s_{g,j+1} by Mirsky,
    "Symmetric gauge functions and unitarily invariant norms", Quarterly Journal of Mathematics 11 (1960).
    """
    return _relative(_next_values(values).square().sum(-2).sqrt().amax(0), top)


def paper(values: Tensor, top: float) -> Tensor:
    """Upper bound of ||E||_2 / ||W||_2: sqrt(k) max_g s_{g,j+1} / s_1(W); never below :func:`operator`.

    Theorem 1 of Liebenwein, Maalouf, Feldman, Rus, NeurIPS 2021.
    """
    return _relative(_next_values(values).flatten(0, -2).amax(0) * values.shape[-2] ** 0.5, top)


def reference(values: Tensor, top: float) -> Tensor:
    """max_g s_{g,j+1} / s_1(W), what torchprune computes. NOT a bound for groups > 1: up to sqrt(groups) too low."""
    return _relative(_next_values(values).flatten(0, -2).amax(0), top)
