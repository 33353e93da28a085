"""Sums of products of rows, kept as one triangle, with an estimate of how far they are from those of more rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...measurement import exact_products

BLOCKS = 4  # of a symmetric product's columns, of which one triangle is computed
MIRRORED = 256  # columns at once
PART = 1 << 17  # entries of a product that are added at once
SAME = 1e-6  # relative distance of what rounding keeps apart


Strips = Iterable[tuple[slice, Tensor]]  # of a symmetric product: some of its rows, from the diagonal on


@dataclass(frozen=True)
class Product:
    """Of some rows x less ``shift`` (groups, 1, n): the upper triangle of the sum of their x x^T (groups, n, n) as
    strips from the diagonal on, each with its rows, their sum (groups, n) in float64, how many there were, how many of
    them differ from one another, and the sum of the fourth powers of their norms."""

    strips: Strips
    mean: Tensor
    used: int
    shift: Tensor | None
    distinct: int
    fourth: float


def triangle(x: Tensor) -> Strips:
    """The upper triangle of x^T x for rows (groups, rows, n), made as it is asked for."""
    width = x.shape[-1]
    step = -(-width // (BLOCKS if width >= 64 else 1))
    for start in range(0, width, step):
        with exact_products():
            strip = x[:, :, start : start + step].mT @ x[:, :, start:]
        yield slice(start, start + step), strip


def plain_rows(rows: Tensor) -> Tensor:
    """Rows (rows, groups, n) as (groups, rows, n), float64 if they are, float32 otherwise."""
    x = rows.detach().transpose(0, 1)
    return x if x.dtype == torch.float64 else x.float()


def _products(x: Tensor, parts: int, shift: Tensor | None) -> list[Product]:
    """Products of so many parts of the rows (groups, rows, n), of their type, made as they are added."""
    cut = [part for part in x.tensor_split(parts, 1) if part.shape[1]] or [x]
    return [_product(part, shift) for part in cut]


def _product(x: Tensor, shift: Tensor | None) -> Product:
    fourth = float(x.square().sum(-1, dtype=torch.float64).square().sum())
    return Product(triangle(x), x.sum(1).double(), x.shape[1], shift, distinct_rows(x), fourth)


def with_few_rows(free: float) -> float:
    """What an estimate of noise from so many rows, less two, is multiplied by: it is itself known that badly only."""
    return 1.0 + 4.0 / free


def distinct_rows(x: Tensor) -> int:
    """How many rows of (groups, rows, n) differ from one another, by a random projection of each."""
    if x.shape[1] < 2:
        return x.shape[1]
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(x.shape[0], x.shape[2], generator=generator, device="cpu").to(x)
    with exact_products():
        at = torch.einsum("grn,gn->r", x, direction).sort().values
    return 1 + int((at.diff() > SAME * at.abs().amax()).sum())


def in_float64(strips: Strips) -> Iterator[tuple[tuple[slice, slice, slice], Tensor, int]]:
    """Where parts of a triangle are, they in float64, and how many of their first columns the diagonal goes through.

    On the CPU these are some rows at a time, which stay in the cache.
    """
    for rows, strip in strips:
        square = min(strip.shape[1], strip.shape[2])
        step = PART // strip[:, :1].numel() + 1 if strip.device.type == "cpu" else strip.shape[1]
        for start in range(0, strip.shape[1], step):
            part = strip[:, start : start + step].double()
            at = slice(rows.start + start, rows.start + start + part.shape[1])
            yield (slice(None), at, slice(rows.start, None)), part, square


def mirror(upper: Tensor) -> None:
    """The lower triangle of (groups, n, n) becomes that of the upper one, in place."""
    for start in range(0, upper.shape[-1], MIRRORED):
        block, rest = slice(start, start + MIRRORED), slice(start + MIRRORED, None)
        square = upper[:, block, block].triu()
        upper[:, block, block] = square + square.triu(1).mT
        upper[:, rest, block] = upper[:, block, rest].mT


class Sums(Protocol):
    """Float64 sums over rows, which several processes may have parts of."""

    def parts(self) -> tuple[list[float], list[list[Tensor]]]:
        """Numbers, and rows of tensors: a row is empty before anything was added to it."""

    def take(self, numbers: Sequence[float], rows: Sequence[Sequence[Tensor]]) -> None:
        """Others in their place."""


class ProductSums:
    """Float64 sums of the products of all batches, each scaled up to all the rows that it was drawn from."""

    def __init__(self) -> None:
        self.begun = False  # by a first call, in this process or another
        self.rows = self.drawn = 0
        self.distinct = self.fourth = 0.0
        self.second: Tensor | None = None
        self.mean: Tensor | None = None
        self.shift: Tensor | None = None
        self.squares = self.weights = 0.0  # over all products: squared norms of their sums, squared numbers of rows

    def products(self, rows: Tensor, centred: bool = True) -> list[Product]:
        """Products of a call's rows, to be added: of two halves of the first call's, later of all of a call's.

        In float64 for float64 rows, in float32 otherwise. A product of rows far from 0 would lose their spread in it:
        if they are to be ``centred``, the mean of the first call's is taken out of all rows before.
        """
        x, first = plain_rows(rows), not self.begun
        if centred and first and len(rows):
            self.shift = x.mean(1, keepdim=True, dtype=torch.float64).to(x.dtype)
        return _products(x if self.shift is None else x - self.shift.to(x.device), 2 if first else 1, self.shift)

    def add(self, products: Sequence[Product], rows: int) -> None:
        """Add the products of some of a call's ``rows``, scaled up to all of them."""
        if self.second is None or self.mean is None:
            self.begun, self.shift, self.mean = True, products[0].shift, torch.zeros_like(products[0].mean)
            self.second = self.mean.new_zeros(*self.mean.shape, self.mean.shape[-1])
        used = sum(product.used for product in products)
        scale = rows / used if used else 0.0
        for product in products:
            for at, part, square in in_float64(product.strips):
                self.second[at].add_(part, alpha=scale)
                self.squares += scale**2 * (2 * _norm2(part) - _norm2(part[:, :, :square]))
            self.mean.add_(product.mean, alpha=scale)
            self.weights += (scale * product.used) ** 2
            self.distinct += product.distinct
            self.fourth += scale**2 * product.fourth
        self.rows, self.drawn = self.rows + rows, self.drawn + used

    def parts(self) -> tuple[list[float], list[list[Tensor]]]:
        """See :class:`Sums`."""
        numbers = [self.rows, self.drawn, self.distinct, self.fourth, self.squares, self.weights]
        return numbers, [[] if self.second is None or self.mean is None else [self.second, self.mean]]

    def take(self, numbers: Sequence[float], rows: Sequence[Sequence[Tensor]]) -> None:
        """See :class:`Sums`."""
        self.rows, self.drawn = map(int, numbers[:2])
        self.distinct, self.fourth, self.squares, self.weights = numbers[2:]
        self.second, self.mean = rows[0] or (None, None)

    def over(self, count: float, distinct_share: float = 1.0) -> Averages:
        """The sums over ``count``, on the CPU, and their noise; the sums are given up.

        ``distinct_share`` is what of the rows counts: what is repeated tells nothing new.
        """
        assert self.second is not None and self.mean is not None
        second, mean = self.second.div_(count), self.mean / count
        self.second = self.mean = None
        mirror(second)
        norm2 = _norm2(second)
        noise, rows = self._noise(norm2, count, distinct_share)
        spread = float(second.diagonal(dim1=-2, dim2=-1).sum() - mean.square().sum())
        if self.shift is not None:
            shift = self.shift.squeeze(1).to(mean)
            both = mean + shift
            for start in range(0, second.shape[-1], MIRRORED):
                block = slice(start, start + MIRRORED)
                second[:, block] += both[:, block, None] * both[:, None] - mean[:, block, None] * mean[:, None]
            mean = both
        mean_noise = max(0.0, spread) / rows if rows > 0 else math.inf
        return Averages(second.cpu(), mean.cpu(), noise, mean_noise)

    def _noise(self, norm2: float, count: float, distinct_share: float) -> tuple[float, float]:
        """Variance of the sum over ``count``, whose squared norm is ``norm2``, and how many rows it is worth, less two.

        The larger one of two estimates: from how far the rows are apart, taken as independent, and from how far parts
        of the data are. With weights w_u that add up to 1, sum_u w_u^2 ||C_u - C||^2 is on average (1 - sum_u w_u^2)
        times the variance of C = sum_u w_u C_u.
        """
        free, share = self.distinct * distinct_share - 2.0, self.weights / self.rows**2
        if free <= 0.0:
            return math.inf, 0.0  # two rows, less their mean, are one: nothing is known
        rows = self.drawn
        of_rows = max(0.0, self.fourth - norm2 * count**2 / rows) * rows / free / count**2
        of_parts = max(0.0, self.squares / count**2 - share * norm2) / (1.0 - share) if share < 1.0 else 0.0
        noise = max(of_rows, of_parts)
        return noise * with_few_rows(free), free * of_rows / max(noise, 1e-300) / with_few_rows(free)


class DiagonalSums:
    """Float64 sums of the squares of rows, entry by entry: the diagonal alone of their products."""

    def __init__(self) -> None:
        self.rows = self.drawn = 0
        self.distinct = 0.0
        self.squares: Tensor | None = None
        self.fourth: Tensor | None = None

    def add(self, samples: Tensor, rows: int) -> None:
        """Add some of a call's ``rows``, (drawn, groups, n), scaled up to all of them."""
        x, scale = plain_rows(samples), rows / max(1, len(samples))
        if self.squares is None or self.fourth is None:
            self.squares, self.fourth = (torch.zeros(x[:, 0].shape, dtype=torch.float64, device=x.device) for _ in "12")
        for part in x.split(max(1, PART // x[:, :1].numel()), 1):
            squares = part.double().square()
            self.squares.add_(squares.sum(1), alpha=scale)
            self.fourth.add_(squares.square().sum(1), alpha=scale**2)
        self.rows, self.drawn = self.rows + rows, self.drawn + len(samples)
        self.distinct += distinct_rows(x)

    def parts(self) -> tuple[list[float], list[list[Tensor]]]:
        """See :class:`Sums`."""
        tensors = [] if self.squares is None or self.fourth is None else [self.squares, self.fourth]
        return [self.rows, self.drawn, self.distinct], [tensors]

    def take(self, numbers: Sequence[float], rows: Sequence[Sequence[Tensor]]) -> None:
        """See :class:`Sums`."""
        (self.rows, self.drawn), self.distinct = map(int, numbers[:2]), numbers[2]
        self.squares, self.fourth = rows[0] or (None, None)

    def over(self, count: float, distinct_share: float = 1.0) -> tuple[Tensor, float]:
        """The sums over ``count`` (groups, n), on the CPU, and the expected squared distance from those of all data."""
        assert self.squares is not None and self.fourth is not None
        free = self.distinct * distinct_share - 2.0
        if free <= 0.0:
            return self.squares.cpu() / count, math.inf
        spread = (self.fourth - self.squares.square() / self.drawn).clamp_min(0).sum()
        return self.squares.cpu() / count, float(spread) * self.drawn / free / count**2 * with_few_rows(free)


class Averages(NamedTuple):
    """Second moment (groups, n, n), mean (groups, n), and the expected squared distance of each from that of all data.

    (Of the second moment: of the covariance. Frobenius norm, float64, on the CPU.)
    """

    second: Tensor
    mean: Tensor
    noise: float
    mean_noise: float


def _norm2(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
