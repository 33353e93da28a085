"""What options that are not given stand for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

from ...allocation import BASELINES
from ...criteria import CRITERIA, DEFAULT_CRITERION, Basis, Moments
from ...errors import ArgumentError
from ...layers import DecomposableLayer


def check_needs(
    criterion: str | None, method: str, data: bool, gradients: bool, hidden_units: bool | None = False
) -> None:
    """ArgumentError where criterion, method or hidden_units= need data, or gradients, that are not there."""
    if hidden_units and (not gradients or (criterion is not None and not CRITERIA[criterion].needs_gradients)):
        raise ArgumentError(
            "hidden_units=True needs gradients, and the criterion 'sensitivity': "
            "analyze(model, data=batches, sensitivity=True), 'kl' for language models"
        )
    baseline = BASELINES.get(method)
    if baseline is not None and baseline.needs_data and not data:
        raise ArgumentError(f"method={method!r} needs data: analyze(model, data=batches)")
    if criterion is None:
        return
    if CRITERIA[criterion].needs_gradients and not gradients:
        raise ArgumentError(f"criterion={criterion!r} needs gradients: analyze(model, data=batches, sensitivity=True)")
    if CRITERIA[criterion].needs_data and not data:
        raise ArgumentError(f"criterion={criterion!r} needs data: analyze(model, data=batches)")


def resolved_criterion(criterion: str | None, moments: Mapping[str, Moments], method: str = "alds") -> str:
    """The criterion asked for, or the best that moments and method allow; ArgumentError where it needs others."""
    gradients = any(m.gradient is not None for m in moments.values())
    check_needs(criterion, method, bool(moments), gradients)
    baseline = BASELINES.get(method)
    if criterion is None and baseline is not None and baseline.criterion is not None:
        return baseline.criterion
    if criterion is None:
        return "sensitivity" if gradients else "output" if moments else DEFAULT_CRITERION
    return criterion


def tell_too_little(basis: Basis, layers: Sequence[DecomposableLayer], hidden_units: bool) -> bool:
    """Whether the data of a basis tell next to nothing of the layers, with a warning that is the caller's caller's.

    ArgumentError with ``hidden_units``, which need them.
    """
    if not basis.used or not basis.untold(layers):
        return False
    if hidden_units:
        raise ArgumentError(
            f"hidden_units=True needs data, and data= has too few samples that differ to tell what the layers see; "
            f"pass more samples, or criterion={basis.criterion!r} to go by these"
        )
    warnings.warn(
        f"data= has too few samples that differ to tell what the layers see: the plan goes by the weights alone "
        f"(criterion={DEFAULT_CRITERION!r}); pass more samples, or criterion={basis.criterion!r}",
        stacklevel=3,
    )
    return True


def resolved_norm(
    p: float | None, criterion: str, shares: Mapping[str, float | None], method: str, few: bool = False
) -> float:
    """p if given; else infinity with error= or a baseline, and the criterion's own otherwise.

    ``few``: data are so few that layers are compared on samples kept aside, which 2 serves best.
    """
    if p is not None:
        return p
    if method in BASELINES or all(share is None for share in shares.values()):
        return math.inf
    return 2.0 if few else CRITERIA[criterion].p


def keeps_constants(basis: Basis, method: str, error: float | None) -> bool:
    """Whether factors may give up some of the weight's error for what layers return for a constant input.

    They do by default (docs/defaults.md); not where another criterion, a baseline or error= says what they are to be.
    """
    plain = basis.criterion == DEFAULT_CRITERION and method not in BASELINES and error is None
    return basis.bias_correction and plain


def check_is_possible(budgets: Sequence[str], criterion: str | None, method: str) -> bool:
    """Whether plans of this kind can be checked: one budget that is counted, solved exactly, a certified criterion.

    ``criterion`` None stands for the one without data.
    """
    certified = CRITERIA[criterion or DEFAULT_CRITERION].certified
    return is_counted_alone(budgets) and certified and method not in BASELINES


def is_counted_alone(budgets: Sequence[str]) -> bool:
    """Whether the budget is a single one of params, flops or memory, whose costs are counted and not measured."""
    return list(budgets) in (["params"], ["flops"], ["memory"])


def resolved_precision(shares: Mapping[str, float | None], criterion: str | None, method: str | None) -> str:
    """The precision of spectra for a plan of this kind, made without data, if none is asked for."""
    budgets = [name for name, share in shares.items() if share is not None]
    return "float32" if check_is_possible(budgets, criterion, method or "alds") else "float64"
