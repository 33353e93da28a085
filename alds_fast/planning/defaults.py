"""What options that are not given stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
    docs/defaults.md has what was measured.)
    """
    if p is not None:
        return p
    if method != "alds" or sum(share is not None for share in shares.values()) != 1:
        return math.inf
    return 2.0 if criterion == "sensitivity" else 4.0


def check_is_possible(budgets: Sequence[str], criterion: str | None, method: str) -> bool:
    """Whether plans of this kind can be checked: one budget of params or flops, solved exactly, by Frobenius norms."""
    return list(budgets) in (["params"], ["flops"]) and criterion in (None, "frobenius") and method == "alds"


def resolved_precision(shares: Mapping[str, float | None], criterion: str | None, method: str | None) -> str:
    """The precision of spectra for a plan of this kind, made without data, if none is asked for."""
    budgets = [name for name, share in shares.items() if share is not None]
    return "float32" if check_is_possible(budgets, criterion, method or "alds") else "float64"
