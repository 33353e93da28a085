"""Sums of products of rows, kept as one triangle, with an estimate of how far they are from those of more rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS = 4  # of a symmetric product's columns, of which one triangle is computed
MIRRORED = 256  # columns at once
PART = 1 << 17  # entries of a product that are added at once


@dataclass(frozen=True)
class Product:
    """Of some rows x less ``shift`` (groups, 1, n): the upper triangle of the sum of their x x^T (groups, n, n) as
    strips from the diagonal on, each with its rows, their sum (groups, n) in float64, and how many there were."""

    strips: Iterable[tuple[slice, Tensor]]
    mean: Tensor
    used: int
    shift: Tensor | None


@contextmanager
def exact_products() -> Iterator[None]:
    """No tf32 or bfloat16 inside float32 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _strips(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
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
    return [Product(_strips(part), part.sum(1).double(), part.shape[1], shift) for part in cut]


def _in_float64(strip: Tensor) -> Iterator[tuple[int, Tensor]]:
    """A strip in float64, on the CPU some rows at a time, which stay in the cache."""
    step = PART // strip[:, :1].numel() + 1 if strip.device.type == "cpu" else strip.shape[1]
    for start in range(0, strip.shape[1], step):
        yield start, strip[:, start : start + step].double()


class ProductSums:
    """Float64 sums of the products of all batches, each scaled up to all the rows that it was drawn from."""

    def __init__(self) -> None:
        self.rows = self.drawn = 0
        self.second: Tensor | None = None
        self.mean: Tensor | None = None
        self.shift: Tensor | None = None
        self.squares = self.weights = 0.0  # over all products: squared norms of their sums, squared numbers of rows

    def products(self, rows: Tensor, centred: bool = True) -> list[Product]:
        """Products of a call's rows, to be added: of two halves of the first call's, later of all of a call's.

        In float64 for float64 rows, in float32 otherwise. A product of rows far from 0 would lose their spread in it:
        if they are to be ``centred``, the mean of the first call's is taken out of all rows before.
        """
        x, first = plain_rows(rows), self.second is None
        if centred and first and len(rows):
            self.shift = x.mean(1, keepdim=True, dtype=torch.float64).to(x.dtype)
        return _products(x if self.shift is None else x - self.shift, 2 if first else 1, self.shift)

    def add(self, products: Sequence[Product], rows: int) -> None:
        """Add the products of some of a call's ``rows``, scaled up to all of them."""
        if self.second is None or self.mean is None:
            self.shift, self.mean = products[0].shift, torch.zeros_like(products[0].mean)
            self.second = self.mean.new_zeros(*self.mean.shape, self.mean.shape[-1])
        used = sum(product.used for product in products)
        scale = rows / used if used else 0.0
        for product in products:
            for block, strip in product.strips:
                square = min(strip.shape[1], strip.shape[2])
                for start, part in _in_float64(strip):
                    at = slice(block.start + start, block.start + start + part.shape[1])
                    self.second[:, at, block.start :].add_(part, alpha=scale)
                    self.squares += scale**2 * (2 * _norm2(part) - _norm2(part[:, :, :square]))
            self.mean.add_(product.mean, alpha=scale)
            self.weights += (scale * product.used) ** 2
        self.rows, self.drawn = self.rows + rows, self.drawn + used

    def over(self, count: float) -> tuple[Tensor, Tensor, float]:
        """The sums over ``count``, on the CPU, and the noise of the first; the sums are given up."""
        assert self.second is not None and self.mean is not None
        second, mean = self.second.div_(count), self.mean / count
        self.second = self.mean = None
        for start in range(0, second.shape[-1], MIRRORED):
            block, rest = slice(start, start + MIRRORED), slice(start + MIRRORED, None)
            square = second[:, block, block].triu()
            second[:, block, block] = square + square.triu(1).mT
            second[:, rest, block] = second[:, block, rest].mT
        noise = self._noise(_norm2(second), count)
        if self.shift is not None:
            shift = self.shift.squeeze(1).double()
            both = mean + shift
            for start in range(0, second.shape[-1], MIRRORED):
                block = slice(start, start + MIRRORED)
                second[:, block] += both[:, block, None] * both[:, None] - mean[:, block, None] * mean[:, None]
            mean = both
        return second.cpu(), mean.cpu(), noise

    def _noise(self, norm2: float, count: float) -> float:
        """Variance of the sum over ``count``, whose squared norm is ``norm2``, from that of its parts.

        With weights w_u that add up to 1, sum_u w_u^2 ||C_u - C||^2 is on average (1 - sum_u w_u^2) times the
        variance of C = sum_u w_u C_u.
        """
        share = self.weights / self.rows**2
        if share >= 1.0:
            return norm2  # one part only: nothing is known
        return max(0.0, self.squares / count**2 - share * norm2) / (1.0 - share)


def _norm2(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
