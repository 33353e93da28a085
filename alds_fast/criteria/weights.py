"""What a layer's errors are weighted by: its input's moment, shrunk by its noise, and that of its gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import WeightShape
from .moments import Moments


@dataclass(frozen=True)
class Weighting:
    """A layer's weight and what it is weighted by, float64: W (g0, f, n), C (g0, n, n) or None, and H, H^-1 (g0, f, f).

    ``output`` is W C W^T, which serves where C is None. ``mean`` is E[W x] (g0, f), ``mean_input`` E[x] (g0, n) where C
    is known, and ``centred`` says whether means were taken out of the moments (where a bias takes them up). ``scale``
    divides squared errors. ``shrinkage`` is the share of noise in C, see :meth:`fitting`.
    """

    shape: WeightShape
    weight: Tensor
    second: Tensor | None
    output: Tensor
    mean: Tensor
    mean_input: Tensor | None
    centred: bool
    root: Tensor | None
    inverse: Tensor | None
    scale: float
    shrinkage: float = 0.0

    @property
    def fitting(self) -> Tensor:
        """The moment for what is fitted with an inverse: the covariance shrunk towards a multiple of the identity.

        With few samples an inverse makes the most of directions in which they hardly spread, by accident. Errors are
        those by C itself.
        """
        assert self.second is not None and self.mean_input is not None
        mean = torch.zeros_like(self.second[..., :1, :]) if self.centred else self.mean_input.unsqueeze(-2)
        product = mean.mT * mean
        return shrunk(self.second - product, self.shrinkage) + product


def shrinkage_of(covariance: Tensor, noise: float) -> float:
    """The share of a multiple of the identity that brings a noisy covariance nearest to the true one, in [0, 1].

    ``noise`` is the expected squared Frobenius distance of the two: noise / ||C - mu 1||^2, mu the mean eigenvalue.
    Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", Journal of
    Multivariate Analysis 88 (2004).
    """
    spread = float((covariance - shrunk(covariance, 1.0)).square().sum())
    return min(1.0, noise / spread) if spread > 0 else float(noise > 0)


def shrunk(covariance: Tensor, share: float) -> Tensor:
    """(1 - share) C + share mu 1, of (..., n, n)."""
    size = covariance.shape[-1]
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    return (1.0 - share) * covariance + share * mean * identity


def _roots(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a positive semidefinite matrix and its inverse, small eigenvalues raised to 1e-6 of the largest.

    (A filter that the output does not depend on in the data still has to be approximated somehow.)
    """
    values, vectors = torch.linalg.eigh(gradient)
    top = values[..., -1:].clamp_min(0)
    values = torch.where(top > 0, values.clamp_min(1e-6 * top), torch.ones_like(values)).sqrt()
    return (vectors * values.unsqueeze(-2)) @ vectors.mT, (vectors / values.unsqueeze(-2)) @ vectors.mT


def _outer(mean: Tensor) -> Tensor:
    return mean.unsqueeze(-1) * mean.unsqueeze(-2)


def weighting(shape: WeightShape, weight: Tensor, moments: Moments, centred: bool, sensitive: bool) -> Weighting:
    """What weights the errors of a layer: relative to its own output, or, ``sensitive``, to the network's.

    ``centred``: a bias will take up the mean of the error.
    """
    w = weight.detach().double().cpu().reshape(shape.conv_groups, -1, shape.numel // shape.out_channels)
    if moments.second is None:
        assert moments.output is not None
        second, output, mean, mean_input = None, moments.output, moments.mean, None
    else:
        second, mean_input = moments.second, moments.mean
        mean = (w @ moments.mean.unsqueeze(-1)).squeeze(-1)
        output = w @ second @ w.mT
    energy = float(output.diagonal(dim1=-2, dim2=-1).sum())
    share = 0.0 if second is None else shrinkage_of(second - _outer(moments.mean), moments.noise)
    if centred:
        second = None if second is None else second - _outer(moments.mean)
        output = output - _outer(mean)
    if not sensitive:
        return Weighting(shape, w, second, output, mean, mean_input, centred, None, None, energy, share)
    assert moments.gradient is not None
    root, inverse = _roots(shrunk(moments.gradient, shrinkage_of(moments.gradient, moments.gradient_noise)))
    seen = float(moments.gradient.diagonal(dim1=-2, dim2=-1).sum()) > 0
    scale = 1.0 if seen else math.inf
    return Weighting(shape, w, second, output, mean, mean_input, centred, root, inverse, scale, share)
