"""Spectra without those channel slices that cannot win, for a criterion and a cost that are known beforehand.

The k slices of a weight refine its d slices where d divides k: k/d slices of rank j lie in one of the d, and their best
approximations together are one of rank j k/d of it. So no criterion that is an error or an upper bound of one is
smaller for (k, j) than for (d, j k/d): for Frobenius norms because the latter is the best of that rank, for operator
norms by Weyl's inequality on W_1 W_1^T + ... + W_m W_m^T. With (k rows + cols) j parameters, fewer by at most a share
1 / (1 + k rows / cols) than those of the coarser one, k cannot win where every (k, j) costs as much as something with
no larger error that is known already.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence

import numpy as np

from .. import linalg
from ..criteria import (
    CRITERIA,
    FoldRoom,
    LayerSpectra,
    batches,
    candidate_groups,
    computed_in_float32,
    layer_spectra,
    mark_float32,
    place,
)
from ..layers import DecomposableLayer
from ..linalg import WeightShape
from .candidates import candidates, costs_of_ranks, forms_of_fold
from .float32_check import TAIL

FIRST = 4  # up to so many slices are computed at once, from shared Gram matrices
MOST = 16
SLACK = 1e-9  # relative, far above the rounding of the spectra in float64


def auto_groups(channels: int) -> tuple[int, ...]:
    """The slice counts that are tried where none are named: divisors up to 16.

    (More slices cost more parameters than they can win back on all but a few convolutions, and kernels run at a
    fraction of their speed.)

    >>> auto_groups(4096), auto_groups(3)
    ((1, 2, 4, 8, 16), (1, 3))
    """
    return tuple(k for k in candidate_groups(channels, "divisors") if k <= MOST)


def may_win(
    shape: WeightShape, known: LayerSpectra, scheme: int, groups: int, criterion: str, align: int,
    pivots_from: float | None = None,
) -> bool:  # fmt: skip
    """Whether some rank of (scheme, groups) could have a smaller error than everything known of that cost or less.

    ``pivots_from`` as for :func:`alds_fast.allocation.candidates`.
    """
    rule = CRITERIA[criterion].rule
    divisors = [k for s, k in known.values if s == scheme and groups % k == 0]
    if not CRITERIA[criterion].bound or not divisors:
        return True  # not a bound: nothing follows for finer slices
    coarse = max(divisors)
    known_candidates = candidates(shape, {key: known.errors(*key, rule) for key in known.values}, align, pivots_from)
    order = np.argsort(known_candidates.costs, kind="stable")
    costs, best = known_candidates.costs[order], np.minimum.accumulate(known_candidates.errors[order])
    forms = forms_of_fold(shape, scheme, groups) if pivots_from is not None else ("",)
    least = np.minimum.reduce([costs_of_ranks(shape, scheme, groups, pivots) for pivots in forms])
    ranks = np.arange(align, np.searchsorted(least, shape.numel), align, dtype=np.int64)
    errors = known.errors(scheme, coarse, rule).numpy()
    bound = errors[np.minimum(ranks * (groups // coarse), len(errors) - 1)]
    at = np.searchsorted(costs, least[ranks], side="right") - 1
    beaten = np.where(at >= 0, best[np.maximum(at, 0)], np.inf)
    return bool(((bound * (1 - SLACK)) ** 2 - (2 * TAIL if known.float32 else 0.0) < beaten**2).any())


def prune_spectra(
    layers: Sequence[DecomposableLayer],
    schemes: Sequence[int],
    groups: Sequence[int] | str | None,
    criterion: str,
    align: int = 1,
    pivots_from: Mapping[str, float] | None = None,
    done: Callable[[int], None] = lambda n: None,
    float32: bool = False,
    whole: Container[str] = (),
) -> list[LayerSpectra]:
    """Spectra of layers under the folds and slice counts that can be on the Pareto front.

    ``groups``: "divisors" for all divisors of a layer's channels, None for :func:`auto_groups`, or a sequence. Budgets
    on parameters, and on the error, have the same solutions as with the spectra of all of them, by every criterion but
    "reference", for which nothing is left out. ``pivots_from``: by layer from which error on it may have pivots, see
    :func:`alds_fast.allocation.candidates.candidates`; None for nowhere. Of layers in ``whole`` nothing is left out:
    those that may not have every rank, or whose cost is no number of parameters. All are worked on together; ``done``
    and ``float32`` as for :func:`alds_fast.criteria.layer_spectra`.
    """
    shapes = {layer.name: layer.shape for layer in layers if layer.shape}
    wanted = {n: candidate_groups(s.slice_channels, groups) if groups else auto_groups(s.slice_channels)
              for n, s in shapes.items()}  # fmt: skip
    named = sorted({k for ks in wanted.values() for k in ks})
    first = tuple(k for k in named if k <= FIRST or not CRITERIA[criterion].bound) or tuple(named)
    least = pivots_from or {}
    room, limit = FoldRoom(), sum(s.numel for s in shapes.values())
    results = {s.layer.name: s for s in layer_spectra(layers, schemes, first, done, limit, float32)}
    for k in sorted(set(named) - set(first)):
        folds = [
            (layer, scheme) for layer in layers if k in wanted[layer.name] for scheme in results[layer.name].top
            if layer.name in whole
            or may_win(shapes[layer.name], results[layer.name], scheme, k, criterion, align, least.get(layer.name))
        ]  # fmt: skip
        for batch in batches(folds, lambda w: shapes[w[0].name].numel, lambda w: place(w[0]), limit):
            solved = linalg.spectra(
                room.matrices(batch), [[k]] * len(batch), float32=float32 and computed_in_float32(batch[0][0])
            )
            for (layer, scheme), (values,) in zip(batch, solved, strict=True):
                results[layer.name].values[scheme, k] = values.cpu()
    return [mark_float32(s) if s.float32 else s for s in results.values()]
