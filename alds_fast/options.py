"""Checks of the options that users give; each raises an error that says the value, the allowed range and the remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

from .bounds import CRITERIA
from .errors import ArgumentError, BudgetError
from .folding import SCHEMES

METHODS = ("alds", "alds-heuristic")
Groups = str | Sequence[int]


def check_schemes(schemes: Sequence[int]) -> tuple[int, ...]:
    """The schemes as a tuple; ArgumentError unless it is a non-empty selection of 0, 1, 2, 3."""
    if not isinstance(schemes, Sequence) or not len(schemes) or any(s not in SCHEMES for s in schemes):
        raise ArgumentError(f"schemes={schemes!r}: expected a non-empty sequence out of {SCHEMES}")
    return tuple(schemes)


def check_groups(groups: Groups) -> Groups:
    """``groups`` if it is "divisors" or a non-empty sequence of positive integers, else ArgumentError."""
    if isinstance(groups, str):
        valid = groups == "divisors"
    else:
        valid = isinstance(groups, Sequence) and len(groups) > 0
        valid = valid and all(isinstance(k, Integral) and not isinstance(k, bool) and k >= 1 for k in groups)
    if not valid:
        raise ArgumentError(f"groups={groups!r}: expected 'divisors' or a non-empty sequence of integers >= 1")
    return groups


def _is_number(value: object) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def check_plan_options(
    params: object, error: object, criterion: object, p: object, method: object, align: object
) -> None:
    """BudgetError or ArgumentError unless these are valid arguments of :meth:`alds_fast.Analysis.plan`."""
    if (params is None) == (error is None):
        given = "none" if params is None else "both"
        raise BudgetError(f"give exactly one budget, params= or error=, got {given}; for example params=0.5 keeps half")
    if params is not None and not (_is_number(params) and 0 < params <= 1):  # type: ignore[operator]
        raise BudgetError(
            f"params={params!r} is outside (0, 1]: it is the share of parameters kept, for example params=0.5"
        )
    if error is not None and not (_is_number(error) and 0 <= error < math.inf):  # type: ignore[operator]
        raise BudgetError(
            f"error={error!r} is outside [0, inf): it is the largest relative error allowed, for example error=0.3"
        )
    if not _is_number(p) or not p >= 1:  # type: ignore[operator]
        raise ArgumentError(f"p={p!r} is outside [1, inf]: 2 for least squares, math.inf for the least largest error")
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        raise ArgumentError(f"criterion={criterion!r} is not one of {', '.join(CRITERIA)}")
    if not isinstance(method, str) or method not in METHODS:
        raise ArgumentError(f"method={method!r} is not one of {', '.join(METHODS)}")
    if not isinstance(align, Integral) or isinstance(align, bool) or align < 1:
        raise ArgumentError(f"align={align!r} is not an integer >= 1")
    if not math.isinf(p) and (error is not None or method != "alds"):  # type: ignore[arg-type]
        raise ArgumentError(f"p={p!r} applies to params= with method='alds' only; leave it at math.inf")
    if method != "alds" and error is not None:
        raise ArgumentError(f"method={method!r} needs params=; error= is solved exactly by method='alds'")
