"""Which hidden units a layer can best do without, and its weight for the others: optimal brain surgeon on columns.

W (f x n) takes hidden units x with second moment C, H^T H weights its outputs. Without the units outside of S, what is
left takes up what it can tell of them: W' = W C[:, S] C[S, S]^-1, the least E ||H (W x - W' x_S)||^2. Of the units
that are there, unit j costs (W^T H^T H W)_jj / (C^-1)_jj with W and C of these; after each, W and C^-1 are those of the
others. Source: Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon" (NIPS 1993),
here for whole columns under a weight of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..weights import Weighting, on_filters

RIDGE = 1e-3  # of C's mean diagonal, added to it: units that are always 0, or copies of others
STEPS = 256  # units are removed in so many steps: those of one step that are cheapest at its beginning


class Compensated(NamedTuple):
    """Of the units kept: a weight (f, kept), and what a bias takes up, (f,), 0 where it takes up nothing."""

    weight: Tensor
    shift: Tensor


def _ridged(w: Weighting) -> Tensor:
    assert w.second is not None
    matrix = w.second[0].clone()
    diagonal = matrix.diagonal()
    diagonal.add_(RIDGE * diagonal.mean() + 1e-300)
    return matrix


def removal_order(w: Weighting, least: int) -> Tensor:
    """The units in the order in which they go until ``least`` are left, (n - least,), int64.

    ``w`` is the weighting of a linear layer whose input's moment is known.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_ridged(w)))
    weighted, there = on_filters(w.root, w.weight)[0].clone(), torch.arange(w.weight.shape[-1], device="cpu")
    order: list[Tensor] = []
    step = math.ceil(len(there) / STEPS)
    while len(there) > least:
        cost = weighted.square().sum(0) / inverse.diagonal()
        going = cost.topk(min(step, len(there) - least), largest=False).indices
        rows = torch.linalg.solve(inverse[going][:, going], inverse[going])
        stay = torch.ones(len(there), dtype=torch.bool, device="cpu").index_fill_(0, going, False)
        order.append(there[going])
        weighted = (weighted - weighted[:, going] @ rows)[:, stay]
        inverse = (inverse - inverse[:, going] @ rows)[stay][:, stay]
        there = there[stay]
    return torch.cat(order) if order else there[:0]


def compensated(w: Weighting, kept: Tensor) -> Compensated:
    """The layer's weight for the units ``kept``, (k,) int64, and what its bias takes up where it is ``centred``."""
    matrix, weight = _ridged(w), w.weight[0]
    factor = torch.linalg.cholesky(matrix[kept][:, kept])
    new = torch.cholesky_solve(matrix[kept] @ weight.mT, factor).mT
    shift = new.new_zeros(len(new))
    if w.centred:
        assert w.mean_input is not None
        shift = weight @ w.mean_input[0] - new @ w.mean_input[0, kept]
    return Compensated(new, shift)


def removal_errors(w: Weighting, order: Tensor, widths: Sequence[int]) -> list[float]:
    """The relative error of the layer with each of these numbers of units left, as errors of ranks are relative."""
    assert w.second is not None
    errors = []
    for kept in (kept_units(order, w.weight.shape[-1], width) for width in widths):
        lost = w.weight[0].clone()
        lost[:, kept] -= compensated(w, kept).weight
        lost = on_filters(w.root, lost.unsqueeze(0))[0]
        square = float(((lost @ w.second[0]) * lost).sum())
        errors.append(math.sqrt(max(0.0, square) / w.scale) if w.scale > 0 else 0.0)
    return errors


def kept_units(order: Tensor, count: int, width: int) -> Tensor:
    """Which of ``count`` units are there once all but ``width`` have gone in that order, ascending, int64."""
    there = torch.ones(count, dtype=torch.bool, device="cpu")
    there[order[: count - width]] = False
    return there.nonzero().flatten()
