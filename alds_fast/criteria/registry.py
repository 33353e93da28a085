"""The criteria by name, each with what is true of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .spectral import frobenius, operator, paper, reference
from .weighted_errors import certificate, errors


@dataclass(frozen=True)
class Criterion:
    """A measure of what a rank loses.

    Attributes:
        rule: the errors of all ranks, from (values, top) as :mod:`alds_fast.criteria.spectral` has it or, with data,
            from (weighting, scheme, groups) as :mod:`alds_fast.criteria.weighted_errors`.
        bound: it is never below the error, or is the error itself.
        needs_data, needs_gradients: moments of the layers' inputs, and of the gradients.
        certified: there are certificates of it for randomized factors and for spectra in float32.
        p: the norm over the layers that serves it best under one budget (docs/defaults.md).
    """

    rule: Callable[..., Tensor]
    bound: bool = False
    needs_data: bool = False
    needs_gradients: bool = False
    certified: bool = False
    p: float = 4.0


CRITERIA = {
    "frobenius": Criterion(frobenius, bound=True, certified=True),
    "operator": Criterion(operator, bound=True),
    "paper": Criterion(paper, bound=True),
    "reference": Criterion(reference),
    "output": Criterion(errors, bound=True, needs_data=True),
    "output-bound": Criterion(certificate, bound=True, needs_data=True),
    "sensitivity": Criterion(errors, needs_data=True, needs_gradients=True, p=2.0),  # squares add up over the layers
}
DEFAULT_CRITERION = "frobenius"  # where there is no data
WEIGHT_CRITERIA = tuple(name for name, criterion in CRITERIA.items() if not criterion.needs_data)
