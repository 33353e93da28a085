"""Errors of every rank of a layer by any criterion: from its spectra alone, or weighted by what it sees in data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .baselines import ONE_SLICE
from .bounds import CRITERIA
from .collector import Moments
from .discover import Layer
from .errors import ArgumentError
from .options import DATA_CRITERIA
from .replace import oriented_weight
from .spectra import LayerSpectra
from .weighted import Weighting, certificate, errors, weighting

MAX_DATA_GROUPS = 8  # channel slices tried with data where groups= is "divisors"
Errors = dict[tuple[int, int], Tensor]


def resolved_criterion(criterion: str | None, moments: Mapping[str, Moments], method: str = "alds") -> str:
    """The criterion asked for, or the best that moments and method allow; ArgumentError where it needs others."""
    gradients = any(m.gradient is not None for m in moments.values())
    if method == "pca":
        if not moments:
            raise ArgumentError("method='pca' needs data: analyze(model, data=batches)")
        return "output" if criterion is None else criterion
    if criterion is None and method in ONE_SLICE:
        return "frobenius"
    if criterion is None:
        return "sensitivity" if gradients else "output" if moments else "frobenius"
    if criterion == "sensitivity" and not gradients:
        raise ArgumentError("criterion='sensitivity' needs gradients: analyze(model, data=batches, sensitivity=True)")
    if criterion in DATA_CRITERIA and not moments:
        raise ArgumentError(f"criterion={criterion!r} needs data: analyze(model, data=batches)")
    return criterion


def resolved_norm(p: float | None, criterion: str, shares: Mapping[str, float | None], method: str) -> float:
    """p if given; else infinity with several budgets, error= or a baseline, 2 for "sensitivity", 4 otherwise.

    (Squares of sensitivities add up to that of the network's output. The others are errors of layers in themselves:
    docs/choices.md has what was measured.)
    """
    if p is not None:
        return p
    if method != "alds" or sum(share is not None for share in shares.values()) != 1:
        return math.inf
    return 2.0 if criterion == "sensitivity" else 4.0


@dataclass(frozen=True)
class Basis:
    """What errors are measured by: a criterion, and, for those of ``DATA_CRITERIA``, the layers' moments.

    ``bias_correction``: biases take up the mean of the error, which then does not count.
    """

    criterion: str
    moments: Mapping[str, Moments] = field(default_factory=dict, repr=False, compare=False)
    bias_correction: bool = True

    def weighting(self, layer: Layer) -> Weighting | None:
        """How this layer's errors are weighted; None for a criterion without data."""
        if not self.used:
            return None
        weight, shape = oriented_weight(layer.module), layer.shape
        assert shape is not None
        centred = self.bias_correction and layer.own_bias
        return weighting(shape, weight, self.moments[layer.name], centred, self.criterion == "sensitivity")

    @property
    def used(self) -> bool:
        """Whether the criterion uses data."""
        return self.criterion in DATA_CRITERIA

    def lacks(self, name: str) -> bool:
        """Whether the criterion needs moments of this layer, or of its gradients, and there are none."""
        found = self.moments.get(name)
        return self.used and (found is None or (self.criterion == "sensitivity" and found.gradient is None))

    def reason(self, layer: Layer) -> str | None:
        """Why a layer has no error by this criterion."""
        return "it is not called with data=" if self.lacks(layer.name) else None


def layer_errors(spectra: LayerSpectra, basis: Basis, max_groups: int | None) -> Errors:
    """Relative errors of ranks 0..r for every (scheme, groups), (r + 1,) float64.

    With data no more than ``max_groups`` slices, and where only the output's moment is known only the encode fold with
    one slice.
    """
    layer = spectra.layer
    if basis.criterion in CRITERIA:
        return {key: spectra.errors(*key, CRITERIA[basis.criterion]) for key in spectra.values}
    if basis.reason(layer):
        return {}
    weights = basis.weighting(layer)
    assert weights is not None
    keys = [k for k in spectra.values if max_groups is None or k[1] <= max_groups]
    keys = [k for k in keys if weights.second is not None or k == (0, 1)]
    rule = certificate if basis.criterion == "output-bound" else errors
    return {key: rule(weights, *key) for key in keys}


def with_outputs(spectra: LayerSpectra, basis: Basis, method: str) -> LayerSpectra:
    """The spectra with the eigenvalues of the output's covariance, where the method is "pca", which goes by these."""
    if method != "pca":
        return spectra
    weights = None if basis.lacks(spectra.layer.name) else basis.weighting(spectra.layer)
    values = torch.zeros(1, dtype=torch.float64) if weights is None else torch.linalg.eigvalsh(weights.output).sum(0)
    return replace(spectra, output=values.flip(0).clamp_min(0))
