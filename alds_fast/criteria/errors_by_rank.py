"""Errors of every rank of a layer by any criterion: from its spectra alone, or weighted by what it sees in data."""

from __future__ import annotations

from torch import Tensor

from .basis import Basis
from .registry import CRITERIA
from .spectra import LayerSpectra

Errors = dict[tuple[int, int], Tensor]
LARGE = 2**18  # weights of a matrix, above which errors of its slices by data take long and were found to gain nothing


def layer_errors(spectra: LayerSpectra, basis: Basis, max_groups: int | None, held_out: bool = False) -> Errors:
    """Relative errors of ranks 0..r for every (scheme, groups), (r + 1,) float64.

    With data no more than ``max_groups`` slices, of large layers without a kernel one, any number if it is None; and
    where only the output's moment is known only the encode fold with one slice. With ``held_out`` those on the rows
    that are kept aside, where there are some.
    """
    layer, criterion = spectra.layer, CRITERIA[basis.criterion_of(spectra.layer.name)]
    if not criterion.needs_data:
        return {key: spectra.errors(*key, criterion.rule) for key in spectra.values}
    large = not layer.shape.kernel and layer.shape.numel > LARGE
    most = 1 if large and max_groups is not None else max_groups
    keys = [k for k in spectra.values if most is None or k[1] <= most or layer.fold]
    keys = [k for k in keys if basis.moments[layer.name].second is not None or k == (0, 1)]
    held_out = held_out and basis.compares_aside(layer)
    return {key: basis.fold_errors(layer, *key, held_out=held_out) for key in keys}
