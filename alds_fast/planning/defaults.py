"""What options that are not given stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..allocation import ONE_SLICE
from ..criteria import DATA_CRITERIA, Moments
from ..errors import ArgumentError


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
