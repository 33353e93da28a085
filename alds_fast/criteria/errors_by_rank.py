"""Errors of every rank of a layer by any criterion: from its spectra alone, or weighted by what it sees in data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..layers import DecomposableLayer, Layer, oriented_weight
from .moments import Moments
from .registry import CRITERIA
from .spectra import LayerSpectra
from .weights import Weighting, weighting

MAX_DATA_GROUPS = 8  # channel slices tried with data where groups= is "divisors"
Errors = dict[tuple[int, int], Tensor]


@dataclass(frozen=True)
class Basis:
    """What errors are measured by: a criterion of ``CRITERIA`` and, where it needs data, the layers' moments.

    ``bias_correction``: biases take up the mean of the error, which then does not count.
    """

    criterion: str
    moments: Mapping[str, Moments] = field(default_factory=dict, repr=False, compare=False)
    bias_correction: bool = True

    def weighting(self, layer: DecomposableLayer) -> Weighting | None:
        """How this layer's errors are weighted; None for a criterion without data."""
        if not self.used:
            return None
        weight, shape = oriented_weight(layer.module), layer.shape
        centred = self.bias_correction and layer.own_bias
        return weighting(shape, weight, self.moments[layer.name], centred, CRITERIA[self.criterion].needs_gradients)

    @property
    def used(self) -> bool:
        """Whether the criterion uses data."""
        return CRITERIA[self.criterion].needs_data

    def lacks(self, name: str) -> bool:
        """Whether the criterion needs moments of this layer, or of its gradients, and there are none."""
        moments = self.moments.get(name)
        needs_gradients = CRITERIA[self.criterion].needs_gradients
        return self.used and (moments is None or (needs_gradients and moments.gradient is None))

    def reason(self, layer: Layer) -> str | None:
        """Why a layer has no error by this criterion."""
        return "it is not called with data=" if self.lacks(layer.name) else None


def layer_errors(spectra: LayerSpectra, basis: Basis, max_groups: int | None) -> Errors:
    """Relative errors of ranks 0..r for every (scheme, groups), (r + 1,) float64.

    With data no more than ``max_groups`` slices, and where only the output's moment is known only the encode fold with
    one slice.
    """
    layer, rule = spectra.layer, CRITERIA[basis.criterion].rule
    if not basis.used:
        return {key: spectra.errors(*key, rule) for key in spectra.values}
    if basis.reason(layer):
        return {}
    weights = basis.weighting(layer)
    assert weights is not None
    keys = [k for k in spectra.values if max_groups is None or k[1] <= max_groups]
    keys = [k for k in keys if weights.second is not None or k == (0, 1)]
    return {key: rule(weights, *key) for key in keys}


def with_outputs(spectra: LayerSpectra, basis: Basis) -> LayerSpectra:
    """The spectra with the eigenvalues of the output's covariance."""
    weights = None if basis.lacks(spectra.layer.name) else basis.weighting(spectra.layer)
    if weights is None:
        return replace(spectra, output=torch.zeros(1, dtype=torch.float64, device="cpu"))
    return replace(spectra, output=torch.linalg.eigvalsh(weights.output).sum(0).flip(0).clamp_min(0))
