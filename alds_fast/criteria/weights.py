"""What a layer's errors are weighted by: its input's moment, shrunk by its noise, and that of its gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..linalg import WeightShape
from .moments import Moments

BLOCK = 8192  # filters that are taken up at a time: a language model's head has 100,000


@dataclass(frozen=True)
class Weighting:
    """A layer's weight and what it is weighted by, float64: W (g0, f, n), C (g0, n, n) or None, and H.

    That is (g0, f, f), upper triangles, or their diagonals (g0, f).

    C is the second moment of data, mixed with what is known without: :func:`weighting`. ``output`` is W C W^T where
    C is None. ``mean`` is E[W x] (g0, f), ``mean_input`` E[x] (g0, n) where C is known, and ``centred`` says that a
    bias takes up the error's mean, which C then does not hold. ``scale`` divides squared errors, which makes them
    ``relative`` to the layer's own output, or else to the network's. ``held`` are rows x (y, where C is None) that C
    does not hold, (g0, rows, n) or None.
    """

    shape: WeightShape
    weight: Tensor
    second: Tensor | None
    output: Tensor | None
    mean: Tensor
    mean_input: Tensor | None
    centred: bool
    root: Tensor | None
    scale: float
    relative: bool
    held: Tensor | None = None

    @functools.cached_property
    def inverse(self) -> Tensor | None:
        """H^-1, as H; only factors need it."""
        if self.root is None or self.root.dim() == 2:
            return None if self.root is None else 1.0 / self.root
        identity = torch.eye(self.root.shape[-1], dtype=self.root.dtype, device=self.root.device)
        return torch.stack([torch.linalg.solve_triangular(matrix, identity, upper=True) for matrix in self.root])


def shrinkage_of(covariance: Tensor, noise: float, alike: Tensor | None = None) -> float:
    """The share of what is known without data that brings a noisy covariance nearest to the true one, in [0, 1].

    ``noise`` is the expected squared Frobenius distance of the two: noise / ||C - mu A||^2, A being ``alike``, the
    identity by default, and mu A of C's trace.
    Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", Journal of
    Multivariate Analysis 88 (2004).
    """
    spread = float((covariance - shrink(covariance, 1.0, alike)).square().sum())
    return min(1.0, noise / spread) if spread > 0 else float(noise > 0)


def shrink(covariance: Tensor, share: float, alike: Tensor | None = None) -> Tensor:
    """(1 - share) C + share mu A, of (g0, n, n); A is ``alike`` or the identity, mu A has the trace of C.

    Of a diagonal (g0, n) too.
    """
    if covariance.dim() == 2:
        return (1.0 - share) * covariance + share * covariance.mean(-1, keepdim=True)
    if alike is None:
        mixed, mean = (1.0 - share) * covariance, covariance.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        mixed.diagonal(dim1=-2, dim2=-1).add_(share * mean)
        return mixed
    traces = (m.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] for m in (covariance, alike))
    return (1.0 - share) * covariance + share * next(traces) / next(traces).clamp_min(1e-300) * alike


def on_filters(matrix: Tensor | None, x: Tensor) -> Tensor:
    """``matrix`` (g0, f, f), or a diagonal (g0, f), or None for the identity, times x (g0, f, n)."""
    if matrix is None:
        return x
    return matrix.unsqueeze(-1) * x if matrix.dim() == 2 else matrix @ x


@functools.lru_cache(maxsize=1)  # a layer is weighted several times in a row
def _root(gradient: Tensor, share: float) -> Tensor:
    """H for a shrunk moment H^T H: its Cholesky factor, transposed.

    1e-6 of its size is added to its diagonal. (A filter that the output does not depend on in the data still has to be
    approximated somehow.)
    """
    gradient = shrink(gradient, share)
    if gradient.dim() == 2:
        top = gradient.amax(-1, keepdim=True).clamp_min(0)
        return torch.where(top > 0, gradient.clamp_min(1e-6 * top), torch.ones_like(gradient)).sqrt()
    identity = torch.eye(gradient.shape[-1], dtype=gradient.dtype, device=gradient.device)
    size = torch.linalg.matrix_norm(gradient)[:, None, None]
    lifted = gradient + torch.where(size > 0, 1e-6 * size, 1.0) * identity
    return torch.stack([torch.linalg.cholesky(matrix, upper=True) for matrix in lifted])


def _gradient_root(moments: Moments) -> Tensor:
    assert moments.gradient is not None
    return _root(moments.gradient, shrinkage_of(moments.gradient, moments.gradient_noise))


def _outer(mean: Tensor) -> Tensor:
    return mean.unsqueeze(-1) * mean.unsqueeze(-2)


def _covariance(moments: Moments) -> Tensor:
    """Of a layer's input, or of its output where only that is known."""
    whole = moments.output if moments.second is None else moments.second
    assert whole is not None
    return whole - _outer(moments.mean)


def noise_share(shape: WeightShape, weight: Tensor, moments: Moments) -> float:
    """:func:`shrinkage_of` what is known of a layer's input (of its output where only that is)."""
    w = _matrix(shape, weight).double().cpu() if moments.second is None else None
    return shrinkage_of(_covariance(moments), moments.noise, None if w is None else w @ w.mT)


def unknown_share(covariance: Tensor, noise: float) -> float:
    """How much of a covariance's square is noise, in [0, 1]: near 1 for a few samples, near 0 for many."""
    norm2 = float(covariance.square().sum())
    return min(1.0, noise / norm2) if norm2 > 0 else float(noise > 0)


def _in_blocks(root: Tensor | None, x: Tensor) -> Iterator[Tensor]:
    """:func:`on_filters` in float64, 8,192 filters at a time; all at once under a whole ``root``."""
    size = x.shape[1] if root is not None and root.dim() == 3 else BLOCK
    for start in range(0, x.shape[1], size):
        at = slice(start, start + size)
        yield on_filters(None if root is None else root[:, at], x[:, at].double().cpu())


def carried(root: Tensor | None, matrix: Tensor, second: Tensor) -> float:
    """tr(H M C M^T H) of M (g0, f, n), C (g0, n, n)."""
    return sum(float((part @ second * part).sum()) for part in _in_blocks(root, matrix))


def _matrix(shape: WeightShape, weight: Tensor) -> Tensor:
    """(g0, f, n), where it lies."""
    return weight.detach().reshape(shape.conv_groups, -1, shape.numel // shape.out_channels)


def triangle(shape: WeightShape, weight: Tensor, moments: Moments, sensitive: bool) -> Tensor | None:
    """R of H W = Q R (g0, n, n): all that errors depend on, of a layer with more filters than columns; else None."""
    if shape.filters_per_group <= shape.columns or moments.second is None:
        return None
    root = _gradient_root(moments) if sensitive else None
    known: Tensor | None = None
    for rows in _in_blocks(root, _matrix(shape, weight)):
        known = torch.linalg.qr(rows if known is None else torch.cat([known, rows], 1), mode="r").R
    return known


def weighting(
    shape: WeightShape,
    weight: Tensor,
    moments: Moments,
    centred: bool,
    sensitive: bool,
    share: float | None = None,
    few: Tensor | None = None,
) -> Weighting:
    """What weights the errors of a layer: relative to its own output, or, ``sensitive``, to the network's.

    What is noise in mean and covariance goes to a multiple of the identity, under which errors are those of the weight
    alone: no rank is to be chosen by what a few samples do not show. ``centred``: a bias will take up the mean of the
    error. ``share`` of the covariance goes to the identity, by default what is noise. With ``few``, the layer's
    :func:`triangle`, in coordinates of the outputs that leave n filters and no H: for errors, not for factors.
    """
    w = _matrix(shape, weight).double().cpu() if few is None else few
    if few is not None:
        shape = replace(shape, out_channels=few.shape[0] * few.shape[1])
    alike = None if moments.second is not None else w @ w.mT
    norm2 = float(moments.mean.square().sum())
    sure = max(0.0, 1.0 - moments.mean_noise / norm2) if norm2 > 0 else 1.0
    covariance = _covariance(moments)
    share = shrinkage_of(covariance, moments.noise, alike) if share is None else share
    mixed = shrink(covariance, share, alike) + shrink((1.0 - sure**2) * _outer(moments.mean), 1.0, alike)
    product = _outer(sure * moments.mean)
    second = mixed if centred else mixed + product
    if alike is None:
        mean_input: Tensor | None = sure * moments.mean
        mean = (w @ (sure * moments.mean).unsqueeze(-1)).squeeze(-1)
        output, energy = None, 1.0 if sensitive else carried(None, w, mixed + product)
    else:
        mean_input, mean, output = None, sure * moments.mean, second
        energy = float((mixed + product).diagonal(dim1=-2, dim2=-1).sum())
    inner = None if alike is not None else second
    held = None if moments.held is None else moments.held.double().transpose(0, 1)
    if not sensitive:
        return Weighting(shape, w, inner, output, mean, mean_input, centred, None, energy, True, held)
    root = _gradient_root(moments) if few is None else None
    return Weighting(shape, w, inner, output, mean, mean_input, centred, root, 1.0, False, held)
