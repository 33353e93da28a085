"""Spectra of all channel slices of all layers under all folds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import linalg
from ..layers import DecomposableLayer, Layer, LowRankLayer, check_weight, oriented_weight
from ..linalg import distinct_schemes, divisors
from .layer_batches import FoldRoom, batches, computed_in_float32, for_threads, place
from .weights import Weighting

Groups = str | Sequence[int]
SAME_NORM = 1e-5  # relative distance of squared norms of one weight


Key = tuple[int, int]  # (scheme, groups)
Recompute = Callable[[Sequence[tuple[DecomposableLayer, Key]]], Iterable[tuple[DecomposableLayer, Key, Tensor]]]


@dataclass(frozen=True)
class LayerSpectra:
    """Singular values of one layer.

    ``values[scheme, groups]`` is (conv_groups, groups, r) float64 on the CPU, descending; ``top[scheme]`` is the
    largest singular value of the whole folded weight; ``output``, where it was asked for, the eigenvalues of the
    covariance of the layer's output on data, (filters of a group,), descending, summed over conv_groups. ``float32``
    names the (scheme, groups) that were computed in float32, (scheme, 1) for ``top`` among them:
    :mod:`alds_fast.allocation.float32_check` says how well they are known.
    """

    layer: DecomposableLayer
    values: dict[tuple[int, int], Tensor]
    top: dict[int, float]
    output: Tensor | None = None
    float32: frozenset[Key] = frozenset()

    def errors(self, scheme: int, groups: int, rule: Callable[[Tensor, float], Tensor]) -> Tensor:
        """Relative error for every rank 0..r, (r + 1,) float64, by a rule of :mod:`alds_fast.criteria.spectral`."""
        return rule(self.values[scheme, groups], self.top[scheme])


@dataclass(frozen=True)
class _FoldedLayer:
    layer: DecomposableLayer
    scheme: int
    groups: tuple[int, ...]  # candidates
    size: int
    computed: tuple[int, ...]


def candidate_groups(channels: int, groups: Groups) -> tuple[int, ...]:
    """The slice counts to try for that many channels, ascending.

    >>> candidate_groups(6, "divisors"), candidate_groups(6, (4, 2, 1))
    ((1, 2, 3, 6), (1, 2))
    """
    allowed = divisors(channels)
    return allowed if groups == "divisors" else tuple(k for k in allowed if k in groups)


def with_groups(layer: Layer, groups: Groups) -> Layer:
    """The layer, left out if none of the groups divides its channels; a low-rank one keeps the slices that it has."""
    if (
        not isinstance(layer, DecomposableLayer)
        or layer.fold
        or layer.is_table
        or candidate_groups(layer.shape.slice_channels, groups)
    ):
        return layer
    return layer.left_out(f"none of groups={groups} divides its {layer.shape.slice_channels} channels")


def _problems(layers: Sequence[DecomposableLayer], schemes: Sequence[int], groups: Groups) -> list[_FoldedLayer]:
    problems = []
    for layer in layers:
        candidates = (1,) if layer.is_table else candidate_groups(layer.shape.slice_channels, groups)
        for scheme in (0,) if layer.is_table else distinct_schemes(schemes, layer.shape.kernel):
            computed = candidates if 1 in candidates else (1, *candidates)  # 1 gives the norm of the whole weight
            problems.append(_FoldedLayer(layer, scheme, candidates, layer.shape.numel, computed))
    return problems


def layer_spectra(
    layers: Sequence[DecomposableLayer],
    schemes: Sequence[int],
    groups: Groups,
    done: Callable[[int], None] = lambda n: None,
    limit: int = 0,
    float32: bool = False,
) -> list[LayerSpectra]:
    """Spectra of the layers, in their order, each with a shape and a finite weight.

    Layers are computed together, as many as have no more weights than the largest one, than as many of median size as
    there are threads (four at most), or than ``limit`` if given. The extra memory is theirs: folds, where these are not
    the weights themselves, Gram matrices (about as many float64 as there are weights) and one eigenproblem a thread.
    ``done`` is told the number of weights finished after each batch. ``float32``: so, where the weight is no wider.
    """
    results = {layer.name: LayerSpectra(layer, {}, {}) for layer in layers}
    for layer in layers:
        if isinstance(layer.module, LowRankLayer):
            results[layer.name] = _of_low_rank(layer, layer.module)
            done(layer.shape.numel)
    dense = [layer for layer in layers if layer.fold is None]
    for problem, values in _solve(_problems(dense, schemes, groups), done, limit, float32):
        result = results[problem.layer.name]
        by_groups = dict(zip(problem.computed, values, strict=True))
        result.top[problem.scheme] = float(by_groups[1].max())
        result.values.update({(problem.scheme, k): by_groups[k] for k in problem.groups})
    marked = {layer.name for layer in dense if float32 and computed_in_float32(layer)}
    return [mark_float32(s) if name in marked else s for name, s in results.items()]


def _of_low_rank(layer: DecomposableLayer, module: LowRankLayer) -> LayerSpectra:
    """The spectra of a low-rank layer's slices, of its own fold, from its factors."""
    left, right = module.slice_factors()
    values = linalg.product_values(left, right)
    top = values
    if module.slices > 1:
        blocks = torch.stack([torch.block_diag(*slices) for slices in right])
        top = linalg.product_values(left.transpose(1, 2).flatten(2), blocks)
    return LayerSpectra(layer, {module.decomposition.fold: values}, {module.scheme: float(top.max())})


def mark_float32(spectra: LayerSpectra) -> LayerSpectra:
    """The spectra, all of them in float32."""
    return replace(spectra, float32=frozenset({*spectra.values, *((scheme, 1) for scheme in spectra.top)}))


def _solve(
    problems: Sequence[_FoldedLayer], done: Callable[[int], None], limit: int, float32: bool
) -> Iterator[tuple[_FoldedLayer, list[Tensor]]]:
    """The problems with the spectra of their ``computed`` slice counts, together as layer_spectra says."""
    room = FoldRoom()
    limit = limit or for_threads([p.size for p in problems])
    for batch in batches(problems, lambda p: p.size, lambda p: place(p.layer), limit):
        matrices = room.matrices([(p.layer, p.scheme) for p in batch])
        solved = linalg.spectra(
            matrices, [p.computed for p in batch], float32=float32 and computed_in_float32(batch[0].layer)
        )
        for problem, values in zip(batch, solved, strict=True):
            yield problem, [v.cpu() for v in values]
        done(sum(p.size for p in batch))


def exact_spectra(wanted: Sequence[tuple[DecomposableLayer, Key]]) -> Iterator[tuple[DecomposableLayer, Key, Tensor]]:
    """Spectra in float64 of single folds and slice counts, which do not depend on what else is computed.

    Raises WeightError for a weight that has become NaN, infinite or empty.
    """
    for layer in {layer.name: layer for layer, _ in wanted}.values():
        check_weight(layer)
    problems = [_FoldedLayer(layer, scheme, (k,), layer.shape.numel, (k,)) for layer, (scheme, k) in wanted]
    for problem, (values,) in _solve(problems, lambda n: None, 0, float32=False):
        yield problem.layer, (problem.scheme, problem.groups[0]), values


def is_spectrum_of(layer: DecomposableLayer, values: Tensor) -> bool:
    """Whether these may be the singular values of a layer's slices: their squares add up to its weight's.

    To 1e-5, as spectra in float32 are known, or where the weight is a product of factors to what its type rounds. They
    do too where a weight was permuted, rotated, or changed its signs.
    """
    weight = oriented_weight(layer.module)
    norm, rounded = float(torch.linalg.vector_norm(weight, dtype=torch.float64)), torch.finfo(weight.dtype).eps
    near = max(SAME_NORM, rounded) if isinstance(layer.module, LowRankLayer) else SAME_NORM
    return math.isclose(norm**2, float(values.square().sum()), rel_tol=near)


def total_work(layers: Sequence[DecomposableLayer], schemes: Sequence[int]) -> int:
    """The number that the ``done`` reports of :func:`layer_spectra` add up to."""
    folds = (
        1 if layer.fold or layer.is_table else len(distinct_schemes(schemes, layer.shape.kernel)) for layer in layers
    )
    return sum(layer.shape.numel * n for layer, n in zip(layers, folds, strict=True))


def with_outputs(spectra: LayerSpectra, w: Weighting | None) -> LayerSpectra:
    """The spectra with the eigenvalues of the output's covariance, 0 where nothing weights the layer's errors."""
    if w is None:
        return replace(spectra, output=torch.zeros(1, dtype=torch.float64, device="cpu"))
    output = w.weight @ w.second @ w.weight.mT if w.second is not None else w.output
    assert output is not None
    values = torch.linalg.eigvalsh(output).sum(0).flip(0).clamp_min(0)
    missing = spectra.layer.shape.filters_per_group - len(values)  # of more filters than columns the others are 0
    return replace(spectra, output=torch.cat([values, values.new_zeros(missing)]))
