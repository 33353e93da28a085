"""What reaches a layer in the compressed network, and the weight that is best for it.

With C = E[x' x'^T] of the inputs x' there and B = E[y x'^T] of the dense network's outputs y = W x, the weight

    W' = W + (B - W C)(C + a I)^-1

has the least E||y - W' x'||^2 for a = 0. With few samples it learns them by heart, so a is chosen: sums are kept for
two halves of the samples, the weight from one half is tried on the other, and the other way round.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..criteria import exact_products

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
        mean = self.mean.unsqueeze(-2)
        return self.second - mean.mT * mean, self.cross - self.mean_y.unsqueeze(-1) * mean

    def lost(self, weight: Tensor, centred: bool) -> float:
        """E||y - V x'||^2 for a weight V (g0, f, n); ``centred``: a bias takes up its mean."""
        second, cross = self.spread(centred)
        explained = (2 * cross * weight - (weight @ second) * weight).sum()
        return self.energy - float(explained) - (float(self.mean_y.square().sum()) if centred else 0.0)


class CrossSums:
    """Float64 sums over rows, for each half of the samples; a call counts by all its rows, drawn or not."""

    def __init__(self) -> None:
        self.halves: tuple[list[Tensor], list[Tensor]] = [], []
        self.counts = [0.0, 0.0]
        self.drawn = 0
        self.paired = True  # every row of y has had its row of x'

    @property
    def rows(self) -> float:
        """How many rows there were."""
        return sum(self.counts)

    def add(self, y: Tensor, x: Tensor, rows: int) -> None:
        """Add y (r, g0, f) and x' (r, g0, n), r of a call's ``rows``, in the order of the samples."""
        if not len(x):
            return  # nothing but padding
        with torch.inference_mode(False):
            self._add_halves(y, x, rows)

    def _add_halves(self, y: Tensor, x: Tensor, rows: int) -> None:
        self.drawn += len(x)
        exact = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
        middle = (len(x) + 1) // 2
        for half, part in enumerate((slice(0, middle), slice(middle, None))):
            own_y, own_x = (t.detach()[part].to(exact).transpose(0, 1) for t in (y, x))
            self._add(half, own_y, own_x, rows / len(x))

    def _add(self, half: int, y: Tensor, x: Tensor, scale: float) -> None:
        with exact_products():
            parts = [x.mT @ x, y.mT @ x, x.sum(1), y.sum(1), y.square().sum()]
        totals = self.halves[half]
        if not totals:
            totals.extend(torch.zeros_like(part, dtype=torch.float64) for part in parts)
        for total, part in zip(totals, parts, strict=True):
            total.add_(part, alpha=scale)
        self.counts[half] += scale * x.shape[1]

    def finite(self) -> bool:
        """Whether no NaN or infinite value was seen."""
        return all(bool(part.isfinite().all()) for half in self.halves for part in half)

    def noise(self) -> float:
        """Expected squared distance of the covariance of x' from the true one, by that of the two halves."""
        if not all(self.counts):
            return float("inf")
        first, second = (self.means(half).spread(True)[0] for half in (0, 1))
        return float((first - second).square().sum()) * self.counts[0] * self.counts[1] / self.rows**2

    def means(self, *halves: int) -> Means:
        """Of some halves, by default both."""
        chosen = halves or (0, 1)
        count = sum(self.counts[half] for half in chosen)
        sums = [sum(rest, one).cpu() for one, *rest in zip(*(self.halves[h] for h in chosen), strict=True)]
        second, cross, mean, mean_y, energy = (total / count for total in sums)
        return Means(second, cross, mean, mean_y, float(energy))


def _towards(weight: Tensor, seen: Means, ridge: float, centred: bool) -> Tensor:
    """W' for one ridge."""
    second, cross = seen.spread(centred)
    size = second.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    if math.isinf(ridge) or not bool(size.any()):
        return weight
    identity = torch.eye(second.shape[-1], dtype=torch.float64, device=second.device)
    ridged = second + torch.where(size > 0, ridge * size, 1.0) * identity
    return weight + torch.linalg.solve(ridged, (cross - weight @ second).mT).mT


def best_weight(weight: Tensor, sums: CrossSums, centred: bool) -> Tensor:
    """W' for the dense W (g0, f, n), float64, with the ridge that does best on the halves that it was not made from."""
    ridge = RIDGES[0]
    if len(RIDGES) > 1 and all(sums.counts):
        lost = dict.fromkeys(RIDGES, 0.0)
        for made, tried in ((0, 1), (1, 0)):
            given, held = sums.means(made), sums.means(tried)
            for a in RIDGES:
                lost[a] += held.lost(_towards(weight, given, a, centred), centred)
        ridge = min(RIDGES, key=lost.__getitem__)
    elif not all(sums.counts):
        ridge = RIDGES[-1]  # one row: nothing to choose by
    return _towards(weight, sums.means(*(h for h in (0, 1) if sums.counts[h])), ridge, centred)
