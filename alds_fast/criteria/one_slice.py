"""Errors of every rank of a layer taken whole (scheme 0, one slice), for any share of its covariance to the identity.

With R of :func:`alds_fast.criteria.weights.weight_for_errors` they depend on y = R x alone: the square of that of rank
j is the sum of E[y y^T]'s eigenvalues beyond j. This matrix is linear in the share, so that products with the moments
are taken once for all shares that are tried, and a share costs one eigenproblem.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import WeightShape
from .moments import Moments
from .weighted_errors import relative_errors, tails
from .weights import covariance_of, known_mean, on_filters, root_of, trace, weight_matrix


@dataclass(frozen=True)
class OneSlice:
    """What the errors of a layer in one slice depend on, float64.

    Attributes:
        gram: (g0, r, r), that of y's part which the share does not change but for its factor: the covariance.
        alike: (g0, r, r), that of y where x is white, of which ``trace`` (g0,) times the share is added,
        unsure: (g0,), and that much of it whatever the share.
        mean: (g0, r) of y.
        centred: a bias takes up the error's mean.
        sensitive: errors are those of the network, not relative to the layer's output.
        seen: (g0, rows, r), y of samples kept aside, or None.
    """

    gram: Tensor
    alike: Tensor
    trace: Tensor
    unsure: Tensor
    mean: Tensor
    centred: bool
    sensitive: bool
    seen: Tensor | None

    def errors(self, share: float) -> tuple[Tensor, Tensor | None]:
        """Relative errors of ranks 0..r, (r + 1,): on the moments, and on the samples kept aside, where there are some.

        They are those of :func:`alds_fast.criteria.weighted_errors.errors` and ``held_out_errors``.
        """
        size = share * self.trace + self.unsure
        gram = (1.0 - share) * self.gram + size[:, None, None] * self.alike
        scale = 1.0 if self.sensitive else float(trace(gram).sum()) + float(self.mean.square().sum())
        if not self.centred:
            gram.baddbmm_(self.mean.unsqueeze(-1), self.mean.unsqueeze(-2))
        if self.seen is None:
            return relative_errors(_from_rank_on(torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0)), scale), None
        values, left = torch.linalg.eigh(gram)
        del gram
        stated = relative_errors(_from_rank_on(values.flip(-1).clamp_min(0)), scale)
        energy = float(self.seen.shape[1]) if self.sensitive else float(self.seen.square().sum())
        rows = self.seen - self.mean.unsqueeze(-2) if self.centred else self.seen
        return stated, relative_errors(_from_rank_on((rows @ left.flip(-1)).square().sum(-2)), energy)


def _from_rank_on(values: Tensor) -> Tensor:
    """Sums over all groups (g0, r), from every rank on."""
    return tails(values.unsqueeze(1))


def one_slice(shape: WeightShape, weight: Tensor, moments: Moments, centred: bool, sensitive: bool,
              few: Tensor | None) -> OneSlice:  # fmt: skip
    """Of a layer's weight; ``few`` is its :func:`alds_fast.criteria.weights.weight_for_errors`, where it has one."""
    w = weight_matrix(shape, weight).double().cpu() if few is None else few
    covariance, known, unsure = covariance_of(moments), *known_mean(moments)
    held = None if moments.held is None else moments.held.double().transpose(0, 1)
    if moments.second is not None:
        gram, alike = w @ covariance @ w.mT, w @ w.mT / w.shape[-1]
        mean, seen = (w @ known.unsqueeze(-1)).squeeze(-1), None if held is None else held @ w.mT
    else:
        root = root_of(moments) if sensitive else None
        alike = w @ w.mT
        alike = alike / trace(alike).clamp_min(1e-300)[:, None, None]
        gram, alike = (on_filters(root, on_filters(root, matrix).mT) for matrix in (covariance, alike))
        mean = on_filters(root, known.unsqueeze(-1)).squeeze(-1)
        seen = None if held is None else on_filters(root, held.mT).mT
    return OneSlice(gram, alike, trace(covariance), unsure, mean, centred, sensitive, seen)
