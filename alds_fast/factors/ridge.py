"""What reaches a layer in the compressed network, and the weight that is best for it.

With C = E[x' x'^T] of the inputs x' there and B = E[y x'^T] of the dense network's outputs y = W x, the weight

    W' = W + (B - W C)(C + a I)^-1

has the least E||y - W' x'||^2 for a = 0. With few samples it learns them by heart, so a is chosen: sums are kept for
two halves of the samples, the weight from one half is tried on the other, and the other way round. What cannot be
tried, because all samples are the same, is not learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..criteria import distinct_rows, squared_norm, with_few_rows
from ..linalg import solve_each
from ..measurement import exact_products

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, math.inf)  # of the mean eigenvalue of C; infinity leaves W as it is


class Means(NamedTuple):
    """E[x' x'^T] (g0, n, n), E[y x'^T] (g0, f, n), E[x'] (g0, n), E[y] (g0, f), E|y|^2; float64, on the CPU."""

    second: Tensor
    cross: Tensor
    mean: Tensor
    mean_y: Tensor
    energy: float

    def spread(self, centred: bool) -> tuple[Tensor, Tensor]:
        """C and B, the products of the means taken out if ``centred``."""
        if not centred:
            return self.second, self.cross
        cross = torch.baddbmm(self.cross, self.mean_y.unsqueeze(-1), self.mean.unsqueeze(-2), alpha=-1.0)
        return self.covariance(), cross

    def covariance(self) -> Tensor:
        """C - E[x'] E[x']^T, of its own memory."""
        mean = self.mean.unsqueeze(-2)
        return torch.baddbmm(self.second, mean.mT, mean, alpha=-1.0)

    def lost(self, weight: Tensor, centred: bool) -> float:
        """E||y - V x'||^2 for a weight V (g0, f, n); ``centred``: a bias takes up its mean."""
        second, cross = self.spread(centred)
        explained = (2 * cross * weight - (weight @ second) * weight).sum()
        return self.energy - float(explained) - (float(self.mean_y.square().sum()) if centred else 0.0)


class CrossSums:
    """Float64 sums over rows, for each half of the samples; a call counts by all its rows, drawn or not.

    Of wide layers they are what takes the memory: once :meth:`means` are asked for they are means, and none are added.
    """

    def __init__(self, worth: float = 1.0) -> None:
        """``worth``: how much of the rows tells something new, see :class:`alds_fast.measurement.Samples`."""
        self.worth = worth
        self.halves: tuple[list[Tensor], list[Tensor]] = [], []
        self.counts = [0.0, 0.0]
        self.drawn = 0
        self.distinct = 0.0
        self.fourth = 0.0  # sum over rows of the fourth power of their distance from ``shift``, times squared weights
        self.shift: Tensor | None = None
        self.paired = True  # every row of y has had its row of x'
        self._averaged = False

    @property
    def rows(self) -> float:
        """How many rows there were."""
        return sum(self.counts)

    def add(self, y: Tensor, x: Tensor, rows: int, half: int) -> None:
        """Add y (r, g0, f) and x' (r, g0, n), r of a call's ``rows``, to a half."""
        if not len(x):
            return  # nothing but padding
        self.drawn += len(x)
        exact = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
        with torch.inference_mode(False):
            y, x = (t.detach().to(exact).transpose(0, 1) for t in (y, x))
            self.shift = x.mean(1, keepdim=True) if self.shift is None else self.shift.to(x.device)
            squares = (x - self.shift).square().sum(-1, dtype=torch.float64)
            self.distinct += distinct_rows(x) * self.worth
            self.fourth += float(squares.square().sum()) * (rows / x.shape[1]) ** 2
            self._add(half, y, x, rows / x.shape[1])

    def _add(self, half: int, y: Tensor, x: Tensor, scale: float) -> None:
        with exact_products():
            parts = [x.mT @ x, y.mT @ x, x.sum(1), y.sum(1), y.square().sum()]
        totals = self.halves[half]
        if not totals:
            totals.extend(torch.zeros_like(part, dtype=torch.float64) for part in parts)
        for total, part in zip(totals, parts, strict=True):
            total.add_(part, alpha=scale)
        self.counts[half] += scale * x.shape[1]

    def parts(self) -> tuple[list[float], list[list[Tensor]]]:
        """What several processes add up, see :func:`alds_fast.criteria.add_up_sums`."""
        return [*self.counts, self.drawn, self.distinct, self.fourth, not self.paired], list(self.halves)

    def take(self, numbers: Sequence[float], rows: Sequence[Sequence[Tensor]]) -> None:
        """What came of it, in the place of what there is."""
        *self.counts, drawn, self.distinct, self.fourth, unpaired = numbers
        self.drawn, self.paired, self.halves = int(drawn), not unpaired, (list(rows[0]), list(rows[1]))

    def finite(self) -> bool:
        """Whether no NaN or infinite value was seen."""
        return all(bool(part.isfinite().all()) for half in self.halves for part in half)

    def noise(self) -> tuple[float, float]:
        """Expected squared distance of the covariance of x' from the true one, and that covariance's squared norm.

        The larger one of two estimates, by how far the rows are apart and by how far the two halves are.
        """
        free, norm2 = self.distinct - 2, squared_norm(self.means().covariance())
        if free <= 0:
            return math.inf, norm2
        of_rows = max(0.0, self.fourth / self.rows**2 * self.drawn - norm2) / free
        apart = self._apart(Means.covariance) if all(self.counts) else 0.0
        return max(of_rows, apart) * with_few_rows(free), norm2

    def _apart(self, part: Callable[[Means], Tensor]) -> float:
        """The variance of what is computed of both halves, by how far it is apart."""
        distance = squared_norm(part(self.means(0)).sub_(part(self.means(1))))
        return distance * self.counts[0] * self.counts[1] / self.rows**2

    def mean_noise(self) -> float:
        """Expected squared distance of the mean of x' from the true one."""
        if self.distinct < 3 or not all(self.counts):
            return math.inf
        return self._apart(lambda means: means.mean.clone()) * with_few_rows(self.distinct - 2)

    def without_noise(self, moved: Callable[[Means], Tensor]) -> Tensor:
        """A mean of all rows, of which noise, by how far the halves' are apart, is taken off towards 0."""
        whole = moved(self.means())
        if self.distinct < 3 or not all(self.counts):
            return torch.zeros_like(whole)
        noise, norm2 = self._apart(moved) * with_few_rows(self.distinct - 2), float(whole.square().sum())
        return whole * (max(0.0, 1.0 - noise / norm2) if norm2 > 0 else 0.0)

    def means(self, *halves: int) -> Means:
        """Of some halves, by default all that have rows; those of one half are not to be changed."""
        if not self._averaged:
            self._averaged = True
            self.halves = self._mean(0), self._mean(1)
        first, *rest = halves or [half for half in (0, 1) if self.counts[half]]
        parts = self.halves[first]
        if rest:
            share = self.counts[rest[0]] / self.rows
            parts = [torch.lerp(a, b, share) for a, b in zip(parts, self.halves[rest[0]], strict=True)]
        second, cross, mean, mean_y, energy = parts
        return Means(second, cross, mean, mean_y, float(energy))

    def _mean(self, half: int) -> list[Tensor]:
        return [total.div_(self.counts[half]).cpu() for total in self.halves[half]]

    def forget_products(self) -> None:
        """What is left are the means of x' and y."""
        for half in self.halves:
            half[:2] = [part.new_zeros(()) for part in half[:2]]


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
        ridged = second.clone()
        ridged.diagonal(dim1=-2, dim2=-1).add_(torch.where(size > 0, ridge * size, 1.0).squeeze(-1))
        yield _solve(ridged, missing).add_(weight)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """X (g0, f, n) with X matrix = right, for symmetric matrices (g0, n, n) that are positive but for rounding."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return solve_each(matrix, right) if bool(failed.any()) else torch.cholesky_solve(right.mT, factor).mT


def best_weight(weight: Tensor, sums: CrossSums, centred: bool) -> Tensor:
    """W' for the dense W (g0, f, n), float64, with the ridge that does best on the halves that it was not made from."""
    ridge = RIDGES[0]
    if len(RIDGES) > 1 and all(sums.counts):
        lost = dict.fromkeys(RIDGES, 0.0)
        for made, tried in ((0, 1), (1, 0)):
            given, held = sums.means(made), sums.means(tried)
            for a, best in zip(RIDGES, _towards(weight, given, RIDGES, centred), strict=True):
                lost[a] += held.lost(best, centred)
        ridge = min(reversed(RIDGES), key=lost.__getitem__)  # of equal ones the largest
    elif not all(sums.counts):
        ridge = RIDGES[-1]  # one row: nothing to choose by
    return next(_towards(weight, sums.means(), [ridge], centred))
