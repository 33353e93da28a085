"""What a layer's errors are weighted by: its input's moment, shrunk by its noise, and that of its gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..linalg import WeightShape, cholesky_in_place
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


def shrinkage_of(covariance: Tensor, noise: float, alike: Tensor | None = None) -> float:
    """The share of what is known without data that brings a noisy covariance nearest to the true one, in [0, 1].

    ``noise`` is the expected squared Frobenius distance of the two: noise / ||C - mu A||^2, A being ``alike``, the
    identity by default, and mu A of C's trace.
    Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", Journal of
    Multivariate Analysis 88 (2004).
    """
    if alike is not None:
        spread = float((covariance - shrink(covariance, 1.0, alike)).square().sum())
    else:  # ||C||^2 less that of its mean
        spread = squared_norm(covariance) - float(trace(covariance).square().sum()) / covariance.shape[-1]
    return min(1.0, noise / spread) if spread > 0 else float(noise > 0)


def squared_norm(x: Tensor) -> float:
    """Of Frobenius, without a copy of x."""
    return float(torch.linalg.vector_norm(x)) ** 2


def shrink(
    covariance: Tensor, share: float, alike: Tensor | None = None, more: Tensor | float = 0.0, in_place: bool = False
) -> Tensor:
    """(1 - share) C + (share tr C + ``more``) A / tr A, of (g0, n, n); A is ``alike`` or the identity.

    Of a diagonal (g0, n) too. ``in_place``: in C's memory.
    """
    size = share * trace(covariance) + more
    mixed = covariance.mul_(1.0 - share) if in_place else (1.0 - share) * covariance
    if alike is not None:
        return mixed.add_(alike * (size / trace(alike).clamp_min(1e-300))[:, None, None])
    diagonal = mixed if mixed.dim() == 2 else mixed.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(size.unsqueeze(-1) / mixed.shape[-1])
    return mixed


def trace(matrix: Tensor) -> Tensor:
    """Of matrices (g0, n, n) or diagonals (g0, n)."""
    return matrix.sum(-1) if matrix.dim() == 2 else matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def on_filters(matrix: Tensor | None, x: Tensor) -> Tensor:
    """``matrix`` (g0, f, f), or a diagonal (g0, f), or None for the identity, times x (g0, f, n)."""
    if matrix is None:
        return x
    return matrix.unsqueeze(-1) * x if matrix.dim() == 2 else matrix @ x


def off_filters(matrix: Tensor | None, x: Tensor) -> Tensor:
    """What :func:`on_filters` made of an x, taken back: H^-1 x for the upper triangles or diagonals H."""
    if matrix is None:
        return x
    if matrix.dim() == 2:
        return x / matrix.unsqueeze(-1)
    return torch.stack([torch.linalg.solve_triangular(one, y, upper=True) for one, y in zip(matrix, x, strict=True)])


def _of_filters(moments: Moments) -> Tensor:
    """H^T H (g0, f, f), or its diagonal (g0, f): the gradients' moment without its noise.

    1e-6 of its size is added to its diagonal. (A filter that the output does not depend on in the data still has to be
    approximated somehow.)
    """
    assert moments.gradient is not None
    matrix = shrink(moments.gradient, shrinkage_of(moments.gradient, moments.gradient_noise))
    if matrix.dim() == 2:
        top = matrix.amax(-1, keepdim=True).clamp_min(0)
        return torch.where(top > 0, matrix.clamp_min(1e-6 * top), torch.ones_like(matrix))
    size = torch.linalg.matrix_norm(matrix)[:, None]
    matrix.diagonal(dim1=-2, dim2=-1).add_(torch.where(size > 0, 1e-6 * size, 1.0))
    return matrix


def root_of(moments: Moments) -> Tensor:
    """H: upper triangles, by Cholesky, or a diagonal."""
    matrix = _of_filters(moments)
    return matrix.sqrt() if matrix.dim() == 2 else cholesky_in_place(matrix)


def _each(function: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
    """Of one matrix after the other; of a single one without a copy."""
    results = [function(matrix) for matrix in matrices]
    return results[0].unsqueeze(0) if len(results) == 1 else torch.stack(results)


def covariance_of(moments: Moments) -> Tensor:
    """Of a layer's input, or of its output where only that is known."""
    whole = moments.output if moments.second is None else moments.second
    assert whole is not None
    return torch.baddbmm(whole, moments.mean.unsqueeze(-1), moments.mean.unsqueeze(-2), alpha=-1.0)


def known_mean(moments: Moments) -> tuple[Tensor, Tensor]:
    """The mean less its noise (g0, n), and of the products of means what is noise (g0,)."""
    norm2 = float(moments.mean.square().sum())
    sure = max(0.0, 1.0 - moments.mean_noise / norm2) if norm2 > 0 else 1.0
    return sure * moments.mean, (1.0 - sure**2) * moments.mean.square().sum(-1)


def noise_share(shape: WeightShape, weight: Tensor, moments: Moments) -> float:
    """:func:`shrinkage_of` what is known of a layer's input (of its output where only that is)."""
    w = weight_matrix(shape, weight).double().cpu() if moments.second is None else None
    return shrinkage_of(covariance_of(moments), moments.noise, None if w is None else w @ w.mT)


def unknown_share(norm2: float, noise: float) -> float:
    """How much of a covariance's squared norm is noise, in [0, 1]: near 1 for a few samples, near 0 for many."""
    return min(1.0, noise / norm2) if norm2 > 0 else float(noise > 0)


def _in_blocks(matrix: Tensor | None, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """:func:`on_filters` in float64, 8,192 filters at a time; all at once under a whole matrix."""
    size = x.shape[1] if matrix is not None and matrix.dim() == 3 else BLOCK
    for start in range(0, x.shape[1], size):
        at = slice(start, start + size)
        yield at, on_filters(None if matrix is None else matrix[:, at], x[:, at].double().cpu())


def carried(root: Tensor | None, matrix: Tensor, second: Tensor) -> float:
    """tr(H M C M^T H) of M (g0, f, n), C (g0, n, n)."""
    return sum(float((part @ second).mul_(part).sum()) for _, part in _in_blocks(root, matrix))


def weight_matrix(shape: WeightShape, weight: Tensor) -> Tensor:
    """(g0, f, n), where it lies."""
    return weight.detach().reshape(shape.conv_groups, -1, shape.numel // shape.out_channels)


def weight_for_errors(shape: WeightShape, weight: Tensor, moments: Moments, sensitive: bool) -> Tensor | None:
    """R with R^T R = W^T H^T H W: all that errors depend on. None where that is W, or where y alone is known.

    Of more filters than columns (g0, n, n), else H W.
    """
    if moments.second is None:
        return None
    matrix = weight_matrix(shape, weight)
    if shape.filters_per_group <= shape.columns:
        return on_filters(root_of(moments), matrix.double().cpu()) if sensitive else None
    filters = _of_filters(moments) if sensitive else None
    products = (matrix[:, at].double().cpu().mT @ rows for at, rows in _in_blocks(filters, matrix))
    return _each(_square_root, functools.reduce(torch.add, products))


def _square_root(matrix: Tensor) -> Tensor:
    """R with R^T R = A for a matrix without negative eigenvalues: by Cholesky, or where some are 0 by these."""
    factor, failed = torch.linalg.cholesky_ex(matrix, upper=True)
    if not failed:
        return factor
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT


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
    :func:`weight_for_errors`, in coordinates of the outputs that leave no H and n filters at most: for errors, not for
    factors.
    """
    w = weight_matrix(shape, weight).double().cpu() if few is None else few
    if few is not None:
        shape = replace(shape, out_channels=few.shape[0] * few.shape[1])
    alike = None if moments.second is not None else w @ w.mT
    covariance, (known, unsure) = covariance_of(moments), known_mean(moments)
    share = shrinkage_of(covariance, moments.noise, alike) if share is None else share
    second = shrink(covariance, share, alike, unsure, in_place=True)
    if not centred:
        second.baddbmm_(known.unsqueeze(-1), known.unsqueeze(-2))
    if alike is None:
        mean_input: Tensor | None = known
        mean = (w @ known.unsqueeze(-1)).squeeze(-1)
        output, energy = None, 1.0 if sensitive else carried(None, w, second)
    else:
        mean_input, mean, output = None, known, second
        energy = float(trace(second).sum())
    energy += float(mean.square().sum()) if centred else 0.0
    inner = None if alike is not None else second
    held = None if moments.held is None else moments.held.double().transpose(0, 1)
    if not sensitive:
        return Weighting(shape, w, inner, output, mean, mean_input, centred, None, energy, True, held)
    root = root_of(moments) if few is None else None
    return Weighting(shape, w, inner, output, mean, mean_input, centred, root, 1.0, False, held)
