"""What is compared: variants of options and functions, described for the log."""

from __future__ import annotations

import functools
import inspect
import itertools
import types
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..allocation import SHARES
from ..errors import ArgumentError
from ..factors import passes_of
from ..files import crc32
from ..planning import Analysis, analyze, check_plan_options
from ..text import number

DENSE = "dense"  # the name of the model as it is
KINDS = ("params", "flops")
Build = Callable[[nn.Module, float, int], nn.Module]


@dataclass(frozen=True)
class Variant:
    """One way to make a model smaller: options of analyze and of plan, or a function (model, share, seed) -> model."""

    name: str
    analysis: dict[str, Any] = field(default_factory=dict)
    planning: dict[str, Any] = field(default_factory=dict)
    data: bool = False
    refit: bool = False
    refine: int = 0  # passes
    build: Build | None = None

    @property
    def needs_data(self) -> bool:
        """Whether the analysis, the refit or the refinement are given data."""
        return self.data or self.refit or self.refine > 0

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that tells this variant from another, JSON-ready."""
        given = {**self.analysis, **self.planning}
        options = {k: _plain(v) for k, v in given.items() if k != "precision"}  # plans are the same
        made = None if self.build is None else callable_name(self.build)
        options |= {"refit": True} if self.refit else {}
        options |= {"refine": self.refine} if self.refine else {}
        return {"name": self.name, "options": options, "data": self.data, "build": made}


def _plain(value: Any) -> Any:
    """A value as JSON; text for what JSON has no form for."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Tensor):
        return _digest(value)
    if isinstance(value, float):
        return number(value)
    if callable(value):
        return callable_name(value)
    return value if value is None or isinstance(value, str | int) else repr(value)


def _digest(inputs: Any) -> Any:
    """Shapes, types and checksums of the tensors in example inputs."""
    if isinstance(inputs, Tensor):
        return [list(inputs.shape), str(inputs.dtype), crc32(inputs)]
    if isinstance(inputs, Mapping):
        return {str(k): _digest(v) for k, v in inputs.items()}
    return [_digest(v) for v in inputs] if isinstance(inputs, list | tuple) else _plain(inputs)


def callable_name(function: Any) -> str:
    """Module and qualified name of a function and a checksum of its code, or its own ``name`` where it has one."""
    named = getattr(function, "name", None)
    if isinstance(named, str):
        return named
    if isinstance(function, functools.partial):
        return f"partial({callable_name(function.func)}, {_plain(function.args)}, {_plain(function.keywords)})"
    if inspect.isfunction(function):
        return f"{function.__module__}.{function.__qualname__} {_code_crc(function.__code__):08x}"
    owner = function if hasattr(function, "__qualname__") else type(function)
    return f"{owner.__module__}.{owner.__qualname__}"


def _code_crc(code: types.CodeType) -> int:
    """CRC-32 of what a function does, without where it stands in its file."""
    total = zlib.crc32(code.co_code)
    for part in (*code.co_names, *code.co_consts):
        inner = isinstance(part, types.CodeType)
        total = zlib.crc32((str(_code_crc(part)) if inner else repr(part)).encode(), total)
    return total


def _defaults(function: Callable[..., Any], without: Iterable[str]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in without}


def read_variant(name: str, options: Mapping[str, Any] | Build, kind: str, example_inputs: Any) -> Variant:
    """A variant from what the user gave, its options checked as far as they can be before the work."""
    if not isinstance(name, str) or not name or name == DENSE:
        raise ArgumentError(f"variants: the name {name!r} is not a text other than '' and {DENSE!r}")
    if not isinstance(options, Mapping):
        if not callable(options):
            raise ArgumentError(f"variants[{name!r}] is neither a dict of options nor a function (model, share, seed)")
        return Variant(name, build=options)
    analysis = _defaults(analyze, ("progress",))
    planning = _defaults(Analysis.plan, (*SHARES, "error", "quality", "evaluate", "example_inputs", "progress"))
    known = {**analysis, **planning, "refit": False, "refine": False}
    if unknown := sorted(str(option) for option in options if option not in known):
        raise ArgumentError(f"variants[{name!r}]: unknown option {unknown[0]!r}; known are {', '.join(sorted(known))}")
    switches = {option: options.get(option, False) for option in ("data", "refit")}
    for option, value in switches.items():
        if not isinstance(value, bool):
            raise ArgumentError(
                f"variants[{name!r}]: {option}={value!r}: True to be given what evaluate(data=) returns"
            )
    chosen = {k: options.get(k, default) for k, default in planning.items()}
    check_plan_options({kind: 0.5}, None, example_inputs, **chosen)
    analysing = {k: options.get(k, default) for k, default in analysis.items() if k != "data"}
    return Variant(name, analysing, chosen, refine=_passes(name, options.get("refine", False)), **switches)


def _passes(name: str, refine: object) -> int:
    try:
        return passes_of(refine)
    except ArgumentError as e:
        raise ArgumentError(f"variants[{name!r}]: {e}") from e


def product(
    methods: Sequence[str],
    criteria: Sequence[str | None],
    ps: Sequence[float | None],
    kind: str = "params",
    example_inputs: Any = None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Variants {methods} x {criteria} x {p}, named after what differs.

    ArgumentError for a value that no method takes; a UserWarning names the combinations that do not go together.

    >>> list(product(["alds"], ["frobenius", "operator"], [2.0, 4.0]))
    ['alds frobenius p=2', 'alds frobenius p=4', 'alds operator p=2', 'alds operator p=4']
    """
    for name, values in (("methods", methods), ("criteria", criteria), ("ps", ps)):
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ArgumentError(f"{name}={values!r}: expected a non-empty list")
    shares = {kind: 0.5}
    for method in methods:
        check_plan_options(shares, None, example_inputs, method=method)
    for criterion, p in itertools.product(criteria, ps):
        check_plan_options(shares, None, example_inputs, criterion=criterion, p=p)
    variants, refused = {}, []
    for method, criterion, p in itertools.product(methods, criteria, ps):
        norm = "p" if p is None else f"p={p:g}"
        words = [method, *([str(criterion)] if len(criteria) > 1 else []), *([norm] if len(ps) > 1 else [])]
        try:
            check_plan_options(shares, None, example_inputs, method=method, criterion=criterion, p=p)
        except ArgumentError as e:
            refused.append(f"{' '.join(words)} ({e})")
            continue
        variants[" ".join(words)] = {**options, "method": method, "criterion": criterion, "p": p}
    if refused:
        warnings.warn(f"left out of the evaluation: {'; '.join(refused)}", stacklevel=3)
    if not variants:
        raise ArgumentError(f"no combination of methods={methods}, criteria={criteria}, ps={ps} goes together")
    return variants
