"""Pivoted factors: a slice of rank r stored in its r (rows + cols - r) degrees of freedom.

(L, R) and (L G, G^-1 R) are the same layer, so a G may be chosen that makes r rows of L, or r columns of R, the
identity, which need not be stored:

output pivots
    The rows of L at r of the filters are the identity. The values between the factors are these filters' outputs, and
    the others are combinations of them. It takes a decoder without a kernel axis, and one slice.
input pivots
    The columns of every slice's R at r of its channels are the identity. It takes an encoder without a kernel axis.

Which rows: those by LU with partial pivoting of an orthonormal basis, which are then exchanged until no coefficient of
another row exceeds ``LARGEST`` in magnitude, so that rounding hardly grows. One matrix at a time is worked on: batched
LU of torch 2.13's MKL returns nonsense with two threads.

Sources: Gu, Eisenstat, "Efficient algorithms for computing a strong rank-revealing QR factorization", SIAM J. Sci.
Comput. 17 (1996), for the exchanges; "Pivoting Factorization" (arXiv 2501.19090) for linear layers.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from .folding import WeightShape, decoder_axes, matrix_shape

Pivots = Literal["", "output", "input"]
Ranks = TypeVar("Ranks", int, np.ndarray)
LARGEST = 2.0
DOUBTFUL = 8.0  # from which coefficients say that the basis is to be made orthonormal first


def pivots_of_fold(shape: WeightShape, scheme: int, groups: int) -> Pivots:
    """Which pivots the factors of a fold and number of slices can have, "" for none.

    >>> pivots_of_fold(WeightShape(8, 8), 0, 1), pivots_of_fold(WeightShape(8, 8), 0, 2)
    ('output', 'input')
    >>> pivots_of_fold(WeightShape(8, 8, (3, 3)), 3, 2), pivots_of_fold(WeightShape(8, 8, (3, 3)), 1, 1)
    ('input', '')
    """
    axes = decoder_axes(scheme, shape.kernel)
    if not axes and groups == 1:
        return "output"
    return "input" if len(axes) == len(shape.kernel) else ""


def saved_by_pivots(shape: WeightShape, groups: int, rank: Ranks) -> Ranks:
    """Entries of the factors that are not stored, of a rank or an array of ranks; the table of indices not counted."""
    return shape.conv_groups * groups * rank * rank


def index_count(shape: WeightShape, pivots: Pivots) -> int:
    """Entries of the table that says where outputs come from, or inputs go to."""
    return {"": 0, "output": shape.out_channels, "input": shape.in_channels}[pivots]


def choose_pivots(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that tell the others: the order of the rows, the r pivots first, and the others' coefficients.

    Pivots and others stand each in the order of the rows, so that what is stored in place lies near together.

    ``basis``: (batch, n, r) of full rank, r < n. Returns the order (batch, n) of int64 and the coefficients
    (batch, n - r, r): ``basis[order[r:]] == coefficients @ basis[order[:r]]``, none above ``LARGEST`` in magnitude.
    """
    orders, coefficients = zip(*map(_pivots_of, basis), strict=True)
    return torch.stack(orders), torch.stack(coefficients)


def _pivots_of(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Of one matrix (n, r): order (n,) and coefficients (n - r, r)."""
    rank = basis.shape[1]
    scaled = basis / basis.norm(dim=0).clamp_min(1e-300)
    order, coefficients = _by_lu(scaled)
    if not _largest(coefficients) <= DOUBTFUL:  # columns that are far from orthogonal mislead it
        order, coefficients = _by_lu(torch.linalg.qr(scaled)[0])
    if _largest(coefficients) > LARGEST:
        _exchange(order, coefficients)
    order = order.to(basis.device)
    (chosen, columns), (rest, rows) = order[:rank].sort(), order[rank:].sort()
    return torch.cat([chosen, rest]), coefficients.index_select(0, rows).index_select(1, columns)


def _largest(coefficients: Tensor) -> float:
    """In magnitude; NaN if one is."""
    return max(map(abs, map(float, coefficients.aminmax()))) if coefficients.numel() else 0.0


def _by_lu(basis: Tensor) -> tuple[Tensor, Tensor]:
    """By LU with partial pivoting: the order of the rows, on the CPU, and the others' coefficients."""
    rank = basis.shape[1]
    factored, swaps, _ = torch.linalg.lu_factor_ex(basis)  # where it is singular, coefficients are no numbers
    order = torch.arange(len(basis), device="cpu")
    rows = order.numpy()
    for i, other in enumerate(swaps[:rank].cpu().numpy() - 1):
        rows[[i, other]] = rows[[other, i]]
    unit, lower = factored.tensor_split([rank])
    return order, torch.linalg.solve_triangular(unit, lower, upper=False, left=False, unitriangular=True)


def _exchange(order: Tensor, coefficients: Tensor) -> None:
    """Exchange a pivot and another row, in both arguments, as long as one makes the pivots' volume grow by enough."""
    rank = coefficients.shape[1]
    while True:
        row, column = divmod(int(coefficients.abs().argmax()), rank)
        value = coefficients[row, column].clone()
        if abs(value) <= LARGEST:
            return
        others, here = coefficients[row].clone(), coefficients[:, column].clone()
        others[column] -= 1
        coefficients -= torch.outer(here / value, others)
        coefficients[row] = -others / value
        coefficients[row, column] = 1 / value
        order[[column, rank + row]] = order[[rank + row, column]]


def pivot_factors(left: Tensor, right: Tensor, shape: WeightShape, pivots: Pivots) -> tuple[Tensor, Tensor, Tensor]:
    """Factors without the identity, and the table of indices.

    ``left``: (conv_groups, groups, rows, rank); ``right``: (conv_groups, groups, rank, cols / groups), in float64.
    Returns, for output pivots, the other filters' rows (conv_groups, 1, rows - rank, rank), ``right`` for these
    pivots, and for every output its place among all pivots followed by all others. For input pivots ``left`` for them,
    the other channels' columns (conv_groups, groups, rank, cols / groups - rank), and which channels the pivots of all
    slices, and then all others, are.
    """
    rank, outer = left.shape[-1], left.shape[:2]
    side = left if pivots == "output" else right.mT
    n = side.shape[2]
    order, coefficients = (part.unflatten(0, outer) for part in choose_pivots(side.flatten(0, 1)))
    chosen = order[..., :rank].unsqueeze(-1)
    if pivots == "output":
        new = torch.gather(left, 2, chosen.expand(-1, -1, -1, rank)) @ right
        return coefficients, new, _places(order.flatten(0, 1), rank)
    at_pivots = torch.gather(right, 3, chosen.mT.expand(-1, -1, rank, -1))
    channels = order.flatten(0, 1) + n * torch.arange(outer.numel(), device=order.device).unsqueeze(1)
    table = torch.cat([channels[:, :rank].flatten(), channels[:, rank:].flatten()])
    return left @ at_pivots, coefficients.mT, table


def _places(order: Tensor, rank: int) -> Tensor:
    """For every row of every group its place among the pivots of all groups, followed by the others of all."""
    groups, n = order.shape
    numbers = torch.arange(groups, device=order.device).unsqueeze(1)
    places = torch.arange(n, device=order.device).expand(groups, n)
    places = torch.where(places < rank, numbers * rank + places, groups * rank + numbers * (n - rank) + places - rank)
    return torch.empty_like(order).scatter_(1, order, places).flatten()


def with_identity(
    encoder: Tensor, decoder: Tensor, table: Tensor, shape: WeightShape, fold: tuple[int, int], pivots: Pivots
) -> tuple[Tensor, Tensor]:
    """Weights of encoder and decoder as they are without pivots: those stored, the identity filled in.

    ``fold``: (scheme, groups). Gradients flow through.
    """
    scheme, groups = fold
    rank = encoder.shape[0] // (shape.conv_groups * groups)
    eye = torch.eye(rank, dtype=encoder.dtype, device=encoder.device)
    if pivots == "output":
        rest = decoder.flatten(1)
        whole = torch.cat([eye.repeat(shape.conv_groups, 1), rest]).index_select(0, table)
        return encoder, whole.reshape(whole.shape + (1,) * (decoder.dim() - 2))
    cols, slices = matrix_shape(shape, scheme)[2] // groups, shape.conv_groups * groups
    parts = table.tensor_split([slices * rank])
    order = torch.cat([part.view(slices, -1) for part in parts], 1) % cols
    rest = encoder.reshape(slices, rank, cols - rank)
    places = torch.empty_like(order).scatter_(1, order, torch.arange(cols, device=order.device).expand_as(order))
    whole = torch.cat([eye.expand(slices, -1, -1), rest], 2)
    whole = torch.gather(whole, 2, places.unsqueeze(1).expand(-1, rank, -1)).flatten(0, 1)
    return whole.reshape(whole.shape + (1,) * (encoder.dim() - 2)), decoder
