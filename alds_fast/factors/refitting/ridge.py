"""What reaches a layer in the compressed network, and the weight that is best for it.

With C = E[x' x'^T] of the inputs x' there and B = E[y x'^T] of the dense network's outputs y = W x, the weight

    W' = W + (B - W C)(C + a I)^-1

has the least E||y - W' x'||^2 for a = 0. With few samples it learns them by heart, so a is chosen: sums are kept for
two halves of the samples, the weight from one half is tried on the other, and the other way round. What cannot be
tried, because all samples are the same, is not learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...linalg import cholesky_in_place, solve_each
from .cross_sums import CrossSums, Means

MOST_TRIED = 128  # filters, or sums of filters, that ridges are tried on
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, math.inf)  # of the mean eigenvalue of C; infinity leaves W


def _towards(weight: Tensor, seen: Means, ridges: Sequence[float], centred: bool) -> Iterator[Tensor]:
    """W' for every ridge."""
    second, cross = seen.spread(centred)
    size = second.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    missing = torch.baddbmm(cross, weight, second, alpha=-1.0)
    del cross
    for ridge in ridges:
        if math.isinf(ridge) or not bool(size.any()):
            yield weight
            continue
        more = torch.where(size > 0, ridge * size, 1.0).squeeze(-1)
        yield _solve(second, more, missing).add_(weight)


def _solve(matrix: Tensor, more: Tensor, right: Tensor) -> Tensor:
    """X (g0, f, n) with X (A + m I) = right, for symmetric A (g0, n, n) and m (g0, 1), positive but for rounding."""
    ridged = matrix.clone()
    ridged.diagonal(dim1=-2, dim2=-1).add_(more)
    try:
        factor = cholesky_in_place(ridged)
    except torch.linalg.LinAlgError:
        ridged = matrix.clone()
        ridged.diagonal(dim1=-2, dim2=-1).add_(more)
        return solve_each(ridged, right)
    half = torch.linalg.solve_triangular(factor, right, upper=True, left=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=False, left=False)


def _signs(filters: int) -> Tensor:
    """Random sums of filters (at most 128, filters) that stand for all: errors of these are on average those of all."""
    if filters <= MOST_TRIED:
        return torch.eye(filters, dtype=torch.float64, device="cpu")
    drawn = torch.randint(2, (MOST_TRIED, filters), generator=torch.Generator().manual_seed(0), device="cpu")
    return (2.0 * drawn - 1.0).double() / math.sqrt(MOST_TRIED)


def best_weight(weight: Tensor, sums: CrossSums, centred: bool) -> Tensor:
    """W' for the dense W (g0, f, n), float64, with the ridge that does best on the halves that it was not made from.

    The sums' halves are joined.

    Of more than 128 filters ridges are tried on random sums, which lose on average what all filters do: the squared
    norm of S e for random signs S / sqrt(128) has the mean ||e||^2.
    """
    ridge = RIDGES[0]
    if len(RIDGES) > 1 and all(sums.counts):
        lost, signs = dict.fromkeys(RIDGES, 0.0), _signs(weight.shape[-2])
        for made, tried in ((0, 1), (1, 0)):
            given, held = (sums.means(half).of_filters(signs) for half in (made, tried))
            for a, best in zip(RIDGES, _towards(signs @ weight, given, RIDGES, centred), strict=True):
                lost[a] += held.lost(best, centred)
        ridge = min(reversed(RIDGES), key=lost.__getitem__)  # of equal ones the largest
    elif not all(sums.counts):
        ridge = RIDGES[-1]  # one row: nothing to choose by
    sums.join()
    return next(_towards(weight, sums.means(), [ridge], centred))
