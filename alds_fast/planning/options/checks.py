"""Checks of the options that users give; each raises an error that says the value, the allowed range and the remedy."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ...allocation import BASELINES, SHARES
from ...checks import is_count, is_number, is_share
from ...criteria import CRITERIA, DEFAULT_CRITERION, Groups
from ...errors import ArgumentError, BudgetError
from ...factors import check_chain, check_schedule, check_wide
from ...linalg import SCHEMES
from ...measurement import first_batch, without_labels
from ...text import meant
from .defaults import is_counted_alone
from .pins import check_pins

UNITS = {f"{letter}{i}B": (1024 if i else 1000) ** n for n, letter in enumerate("kMGT", 1) for i in ("", "i")}
UNITS |= {"KB": 1000, "KiB": 1024, "B": 1}
_BYTES = re.compile(rf"(\d+\.?\d*) ?({'|'.join(UNITS)})", re.IGNORECASE)
METHODS = ("alds", *BASELINES)


def refuse_unknown(given: Iterable[str], function: Callable[..., Any]) -> None:
    """ArgumentError for names that ``plan`` has no options of; those of what it is too late for say where they go."""
    for name in given:
        known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        words = meant(name, known) or f"; options are {', '.join(known)}"
        if name in ("include", "exclude"):
            words = ": analyze() takes it; pins={pattern: 'dense'} keeps layers dense in one plan"
        raise ArgumentError(f"plan has no option {name!r}{words}")


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


_COUNTS = {
    "params": "; an integer above 1 is a number of them, for example params=5_000_000",
    "flops": "; an integer above 1 is a number of them, for example flops=200_000_000",
    "memory": "; an integer above 1 is a number of bytes, and a text like '20MB' too",
    "latency": "",
}


def budget_amount(value: Any) -> float:
    """A budget as a share, or above 1 as a whole number; bytes for texts like 20MB or 1.5 GiB.

    BudgetError for a text that is none. Other values that are no budgets stay as they are.

    >>> budget_amount("20MB"), budget_amount("1.5 gib"), budget_amount(0.5)
    (20000000, 1610612736, 0.5)
    """
    if isinstance(value, str):
        amount = _BYTES.fullmatch(value.strip())
        if amount is None:
            raise BudgetError(f"memory={value!r} is not like '20MB', with a unit out of {', '.join(UNITS)}")
        return int(float(amount[1]) * next(UNITS[unit] for unit in UNITS if unit.lower() == amount[2].lower()))
    return int(value) if is_count(value, 2) else float(value) if is_number(value) else value


def _check_budgets(shares: Mapping[str, object], error: object, example_inputs: object) -> list[str]:
    """The names of the budgets given, checked."""
    given = [name for name, share in shares.items() if share is not None]
    if bool(given) == (error is not None):
        budgets = " and ".join((", ".join(f"{name}=" for name in [*SHARES][:-1]), f"{[*SHARES][-1]}="))
        text = f"error= with {', '.join(given)}" if given else "none"
        raise BudgetError(
            f"give one budget or several of {budgets}, or error= alone, or quality= with evaluate=, got {text}; for "
            f"example params=0.5 keeps half"
        )
    for name in given:
        share = shares[name]
        if name == "memory":
            share = budget_amount(share)
        if not is_share(share) and (name == "latency" or not is_count(share)):
            raise BudgetError(
                f"{name}={share!r} is outside (0, 1]: it is the share of {SHARES[name]}, for example {name}=0.5"
                f"{_COUNTS[name]}"
            )
        if name in ("flops", "latency") and example_inputs is None:
            raise ArgumentError(f"{name}= needs example_inputs=, a tensor, tuple or dict as model(...) takes it")
    if error is not None and not (is_number(error) and 0 <= error < math.inf):
        raise BudgetError(
            f"error={error!r} is outside [0, inf): it is the largest relative error allowed, for example error=0.3"
        )
    return given


def check_quality(quality: object, evaluate: object, budgets: Mapping[str, object]) -> bool:
    """Whether a quality is asked for; BudgetError or ArgumentError where it is no number, or not alone."""
    if quality is None and evaluate is None:
        return False
    if quality is None:
        raise BudgetError("evaluate= goes with quality=, the least that it may return; pass both, or neither")
    if not is_number(quality) or not math.isfinite(quality):
        raise BudgetError(
            f"quality={quality!r} is not a number: it is the least that evaluate(model) may return, for example "
            f"0.99 * evaluate(model)"
        )
    if not callable(evaluate):
        raise ArgumentError("quality= needs evaluate=, a function of a model that returns a number, higher is better")
    given = [f"{name}=" for name, budget in budgets.items() if budget is not None]
    if given:
        raise BudgetError(f"quality= stands alone: it finds the fewest parameters; leave {', '.join(given)} out")
    return True


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
    pins: object = None,
    min_rank: object = 1,
    hidden_units: object = False,
) -> None:
    """BudgetError or ArgumentError unless these are valid arguments of :meth:`alds_fast.Analysis.plan`.

    ``shares`` are those of params=, flops=, memory= and latency=, None where not given. (The layers that importance=
    and pins= mean are checked where these are known.)
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
        raise ArgumentError(
            f"importance is a {type(importance).__name__}: expected numbers >= 0 by name, pattern or class of layers"
        )
    if not isinstance(method, str) or method not in METHODS:
        raise ArgumentError(f"method={method!r} is not one of {', '.join(METHODS)}")
    check_pins(pins, min_rank, method)
    if not is_count(align):
        raise ArgumentError(f"align={align!r} is not an integer >= 1")
    if not math.isinf(p) and (not given or method in BASELINES):
        raise ArgumentError(
            f"p={p!r} applies to budgets other than error= with method='alds' only; leave it at math.inf"
        )
    if method in BASELINES and not is_counted_alone(given):
        raise ArgumentError(
            f"method={method!r} needs params=, flops= or memory=, one alone; method='alds' solves the others"
        )
    if not isinstance(hidden_units, bool):
        raise ArgumentError(f"hidden_units={hidden_units!r} is not True or False")
    if hidden_units and (method in BASELINES or not is_counted_alone(given)):
        raise ArgumentError(
            "hidden_units=True goes with method='alds' and one budget, of params=, flops= or memory=; leave it out"
        )
    if not (cache is None or cache is False or (isinstance(cache, str | os.PathLike) and str(cache))):
        raise ArgumentError(f"cache={cache!r}: expected a folder, None for the default one or False for none")


def check_refining(
    model: nn.Module, layers: Sequence[str], data: Iterable[Any], epochs: int, lists: Sequence[str] | None
) -> None:
    """Raises what refinement of these layers would raise, as far as one batch tells, before the work."""
    check_schedule(data, "refine=", epochs)
    modules = dict(model.named_modules(remove_duplicate=False))
    check_wide({name: modules[name].weight for name in layers if name in modules}, "refine=")
    check_chain(model, first_batch(model, without_labels(model, data))[0], lists)
