"""Sums of what reaches a layer in the compressed network, and of the dense network's outputs beside it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...criteria import distinct_rows, in_float64, mirror, plain_rows, squared_norm, triangle, with_few_rows
from ...measurement import exact_products

ROWS_AT_ONCE = 512  # of a covariance that is not kept


class Means(NamedTuple):
    """E[x' x'^T] (g0, n, n), E[y x'^T] (g0, f, n), E[x'] (g0, n), E[y] (g0, f), E|y|^2; float64, on the CPU."""

    second: Tensor
    cross: Tensor
    mean: Tensor
    mean_y: Tensor
    energy: float

    def of_filters(self, sums: Tensor) -> Means:
        """Those of S y for sums S (s, f) of filters; the energy is that of all."""
        return self._replace(cross=sums @ self.cross, mean_y=self.mean_y @ sums.mT)

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
        explained = 2 * float((cross * weight).sum()) - float((weight @ second).mul_(weight).sum())
        return self.energy - explained - (float(self.mean_y.square().sum()) if centred else 0.0)


class Rows(NamedTuple):
    """Some of ``drawn_from`` rows x' that reach a layer in a call, and what all layers that read them sum up."""

    x: Tensor  # (g0, r, n), float64 if they are, float32 otherwise
    drawn_from: int
    strips: Callable[[], Iterable[tuple[slice, Tensor]]]  # the upper triangle of the sum of x' x'^T
    total: Tensor  # (g0, n)
    distinct: int
    fourth: float  # sum of the fourth power of their distances from ``shift``
    shift: Tensor  # (g0, 1, n)


def rows_read(samples: Tensor, count: int, shift: Tensor | None, shared: bool) -> Rows | None:
    """Of rows (r, g0, n), by default with their mean as ``shift``; None without any: there was nothing but padding.

    ``shared``: several layers take up the products, which are then kept.
    """
    if not len(samples):
        return None
    with torch.inference_mode(False):
        x = plain_rows(samples)
        shift = x.mean(1, keepdim=True) if shift is None else shift.to(x.device)
        squares = (x - shift).square().sum(-1, dtype=torch.float64)
        fourth = float(squares.square().sum())
        strips = partial(iter, list(triangle(x))) if shared else partial(triangle, x)
        return Rows(x, count, strips, x.sum(1), distinct_rows(x), fourth, shift)


class LastRead:
    """The rows of the tensor that a layer has read last: layers that read one tensor share them."""

    def __init__(self) -> None:
        self._of: Callable[[], Tensor | None] = lambda: None
        self._key: Any = None
        self._rows: list[Rows | None] = []

    def rows(self, x: Tensor, key: Any, made: Callable[[], list[Rows | None]]) -> list[Rows | None]:
        """Those that are there, if the tensor and all that the ``key`` has are the same, else what is ``made``."""
        if self._of() is not x or self._key != key:
            self._rows, self._of, self._key = made(), weakref.ref(x), key
        return self._rows


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

    def add(self, y: Tensor, rows: Rows, half: int) -> None:
        """Add y (r, g0, f) of a call beside its rows x' to a half."""
        scale = rows.drawn_from / len(y)
        self.shift = rows.shift
        self.drawn += len(y)
        self.distinct += rows.distinct * self.worth
        self.fourth += rows.fourth * scale**2
        self.counts[half] += rows.drawn_from
        with torch.inference_mode(False), exact_products():
            y = plain_rows(y).to(rows.x.dtype)
            parts = [y.mT @ rows.x, rows.total, y.sum(1), y.square().sum()]
            totals = self.halves[half]
            if not totals:
                size = rows.x.shape[-1]
                totals.append(rows.x.new_zeros(len(rows.x), size, size, dtype=torch.float64))
                totals.extend(torch.zeros_like(part, dtype=torch.float64) for part in parts)
            for at, strip, _ in in_float64(rows.strips()):
                totals[0][at].add_(strip, alpha=scale)
            for total, part in zip(totals[1:], parts, strict=True):
                total.add_(part, alpha=scale)

    def parts(self) -> tuple[list[float], list[list[Tensor]]]:
        """What several processes add up, see :func:`alds_fast.criteria.add_up_sums`."""
        return [*self.counts, self.drawn, self.distinct, self.fourth, not self.paired], list(self.halves)

    def take(self, numbers: Sequence[float], rows: Sequence[Sequence[Tensor]]) -> None:
        """What came of it, in the place of what there is."""
        *self.counts, drawn, self.distinct, self.fourth, unpaired = numbers
        self.drawn, self.paired, self.halves = int(drawn), not unpaired, (list(rows[0]), list(rows[1]))

    def finite(self) -> bool:
        """Whether no NaN or infinite value was seen."""
        extremes = (float(value) for half in self.halves for part in half for value in part.aminmax())
        return all(map(math.isfinite, extremes))

    def noise(self) -> tuple[float, float]:
        """Expected squared distance of the covariance of x' from the true one, and that covariance's squared norm.

        The larger one of two estimates, by how far the rows are apart and by how far the two halves are.
        """
        free, norm2 = self.distinct - 2, sum(map(squared_norm, self._covariance(*self._seen())))
        if free <= 0:
            return math.inf, norm2
        of_rows = max(0.0, self.fourth / self.rows**2 * self.drawn - norm2) / free
        apart = self._apart(self._covariance) if all(self.counts) else 0.0
        return max(of_rows, apart) * with_few_rows(free), norm2

    def _covariance(self, *halves: int) -> Iterator[Tensor]:
        """That of x' in some halves, some of its rows at a time: all of it is as large as the sums."""
        mean = self._mean_of(2, halves)
        for at in (slice(start, start + ROWS_AT_ONCE) for start in range(0, mean.shape[-1], ROWS_AT_ONCE)):
            second = self._mean_of(0, halves, at)
            yield torch.baddbmm(second, mean[:, at].unsqueeze(-1), mean.unsqueeze(-2), alpha=-1.0)

    def _apart(self, part: Callable[[int], Iterable[Tensor]]) -> float:
        """The variance of what is computed of each half, by how far it is apart."""
        distance = sum(squared_norm(a.sub(b)) for a, b in zip(part(0), part(1), strict=True))
        return distance * self.counts[0] * self.counts[1] / self.rows**2

    def mean_noise(self) -> float:
        """Expected squared distance of the mean of x' from the true one."""
        if self.distinct < 3 or not all(self.counts):
            return math.inf
        return self._apart(lambda half: [self.means(half).mean]) * with_few_rows(self.distinct - 2)

    def without_noise(self, moved: Callable[[Means], Tensor]) -> Tensor:
        """A mean of all rows, of which noise, by how far the halves' are apart, is taken off towards 0."""
        whole = moved(self.means())
        if self.distinct < 3 or not all(self.counts):
            return torch.zeros_like(whole)
        apart = self._apart(lambda half: [moved(self.means(half))])
        noise, norm2 = apart * with_few_rows(self.distinct - 2), float(whole.square().sum())
        return whole * (max(0.0, 1.0 - noise / norm2) if norm2 > 0 else 0.0)

    def means(self, *halves: int) -> Means:
        """Of some halves, by default all that have rows; those of one half are not to be changed."""
        second, cross, mean, mean_y, energy = (self._mean_of(part, halves or self._seen()) for part in range(5))
        return Means(second, cross, mean, mean_y, float(energy))

    def _seen(self) -> tuple[int, ...]:
        """The halves that have rows."""
        return tuple(half for half in (0, 1) if self.counts[half])

    def _mean_of(self, part: int, halves: Sequence[int], at: slice | None = None) -> Tensor:
        """A part of the means of some halves, or rows of it."""
        self._average()
        first, *rest = [self.halves[half][part] if at is None else self.halves[half][part][:, at] for half in halves]
        if not rest or rest[0] is first:  # or joined
            return first
        return torch.lerp(first, rest[0], self.counts[halves[1]] / self.rows)

    def _average(self) -> None:
        if not self._averaged:
            self._averaged = True
            self.halves = self._averages(0), self._averages(1)

    def _averages(self, half: int) -> list[Tensor]:
        parts = [total.div_(self.counts[half]).cpu() for total in self.halves[half]]
        for second in parts[:1]:
            mirror(second)
        return parts

    def join(self) -> None:
        """What is left of products are those of all rows: of the halves their means are told apart."""
        self._average()
        if all(self.counts):
            first, second = self.halves
            for part in range(2):
                first[part].lerp_(second[part], self.counts[1] / self.rows)
                second[part] = first[part]

    def forget_products(self) -> None:
        """What is left are the means of x' and y."""
        for half in self.halves:
            half[:2] = [part.new_zeros(()) for part in half[:2]]
