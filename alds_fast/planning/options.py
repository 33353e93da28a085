"""Checks of the options that users give; each raises an error that says the value, the allowed range and the remedy."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence

from ..allocation import BASELINES, SHARES
from ..checks import is_count, is_number, is_share
from ..criteria import CRITERIA, DEFAULT_CRITERION, Groups
from ..errors import ArgumentError, BudgetError, LayerNotFoundError
from ..linalg import SCHEMES
from .defaults import is_counted_alone

METHODS = ("alds", *BASELINES)


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
        valid = valid and all(map(is_count, groups))
    if not valid:
        raise ArgumentError(f"groups={groups!r}: expected 'divisors' or a non-empty sequence of integers >= 1")
    return groups


def check_held_out(share: float) -> float:
    """The share of the samples to keep aside; ArgumentError unless it is in [0, 1)."""
    if not is_number(share) or not 0 <= share < 1:
        raise ArgumentError(f"held_out={share!r} is outside [0, 1): the share of the samples that is kept aside")
    return float(share)


def check_moment_memory(limit: int | None) -> int:
    """The most bytes of moments, half of the machine's memory for None; ArgumentError unless it is a count."""
    if limit is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if not is_count(limit):
        raise ArgumentError(f"moment_memory={limit!r} is not a number of bytes >= 1; for example 8 * 10**9")
    return int(limit)


def is_float32(precision: str) -> bool:
    """Whether ``precision`` is "float32", not "float64"; ArgumentError if it is neither."""
    if precision not in ("float32", "float64"):
        raise ArgumentError(f"precision={precision!r} is neither 'float32' nor 'float64'")
    return precision == "float32"


def check_importance(importance: Mapping[str, float] | None, names: Collection[str]) -> Mapping[str, float]:
    """The factors of the layers' errors; LayerNotFoundError for a name that is none of ``names``, ArgumentError."""
    importance = {} if importance is None else importance
    for name, value in importance.items():
        if name not in names:
            raise LayerNotFoundError(f"importance= names {name!r}, which is no layer that can be factorised")
        if not (is_number(value) and 0 <= value < math.inf):
            raise ArgumentError(f"importance[{name!r}]={value!r} is outside [0, inf)")
    return importance


def _check_budgets(shares: Mapping[str, object], error: object, example_inputs: object) -> list[str]:
    """The names of the budgets given, checked."""
    given = [name for name, share in shares.items() if share is not None]
    if bool(given) == (error is not None):
        text = f"error= with {', '.join(given)}" if given else "none"
        raise BudgetError(
            f"give one budget or several of params=, flops= and latency=, or error= alone, got {text}; for example "
            f"params=0.5 keeps half"
        )
    for name in given:
        share = shares[name]
        if not is_share(share):
            raise BudgetError(
                f"{name}={share!r} is outside (0, 1]: it is the share of {SHARES[name]}, for example {name}=0.5"
            )
        if name != "params" and example_inputs is None:
            raise ArgumentError(f"{name}= needs example_inputs=, a tensor, tuple or dict as model(...) takes it")
    if error is not None and not (is_number(error) and 0 <= error < math.inf):
        raise BudgetError(
            f"error={error!r} is outside [0, inf): it is the largest relative error allowed, for example error=0.3"
        )
    return given


def check_plan_options(
    shares: Mapping[str, object],
    error: object,
    example_inputs: object,
    *,
    criterion: object = None,
    p: object = None,
    method: object = "alds",
    align: object = 1,
    bias_correction: object = True,
    importance: object = None,
    cache: object = None,
    pivots: object = True,
) -> None:
    """BudgetError or ArgumentError unless these are valid arguments of :meth:`alds_fast.Analysis.plan`.

    ``shares`` are those of params=, flops= and latency=, None where not given. (The names in importance= are checked
    where the layers are known.)
    """
    baseline = BASELINES.get(method) if isinstance(method, str) else None
    if baseline is not None and baseline.needs_data and criterion not in (None, baseline.criterion):
        raise ArgumentError(
            f"method={method!r} is made for criterion={baseline.criterion!r}, not {criterion!r}; leave criterion out"
        )
    criterion, p = DEFAULT_CRITERION if criterion is None else criterion, math.inf if p is None else p
    given = _check_budgets(shares, error, example_inputs)
    if not is_number(p) or not p >= 1:
        raise ArgumentError(f"p={p!r} is outside [1, inf]: 2 for least squares, math.inf for the least largest error")
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        raise ArgumentError(f"criterion={criterion!r} is not one of {', '.join(CRITERIA)}")
    if not isinstance(bias_correction, bool):
        raise ArgumentError(f"bias_correction={bias_correction!r} is not True or False")
    if not isinstance(pivots, bool):
        raise ArgumentError(f"pivots={pivots!r} is not True or False")
    if importance is not None and not isinstance(importance, Mapping):
        raise ArgumentError(f"importance is a {type(importance).__name__}: expected numbers >= 0 by layer name")
    if not isinstance(method, str) or method not in METHODS:
        raise ArgumentError(f"method={method!r} is not one of {', '.join(METHODS)}")
    if not is_count(align):
        raise ArgumentError(f"align={align!r} is not an integer >= 1")
    if not math.isinf(p) and (not given or method in BASELINES):
        raise ArgumentError(
            f"p={p!r} applies to budgets of params=, flops= and latency= with method='alds' only; leave it at math.inf"
        )
    if method in BASELINES and not is_counted_alone(given):
        raise ArgumentError(f"method={method!r} needs params= or flops=, one alone; method='alds' solves the others")
    if not (cache is None or cache is False or (isinstance(cache, str | os.PathLike) and str(cache))):
        raise ArgumentError(f"cache={cache!r}: expected a folder, None for the default one or False for none")
