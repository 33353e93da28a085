"""What an evaluation consists of: variants, the cells variant x budget x seed, and what identifies each of them."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import json
import types
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn

from ..allocation import SHARES
from ..errors import ArgumentError, BudgetError
from ..files import crc32
from ..layers import count_params
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
    build: Build | None = None

    @property
    def needs_data(self) -> bool:
        """Whether the analysis or the refit are given data."""
        return self.data or self.refit

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that tells this variant from another, JSON-ready."""
        given = {**self.analysis, **self.planning}
        options = {k: _plain(v) for k, v in given.items() if k != "precision"}  # plans are the same
        made = None if self.build is None else callable_name(self.build)
        options |= {"refit": True} if self.refit else {}
        return {"name": self.name, "options": options, "data": self.data, "build": made}


@dataclass(frozen=True)
class Cell:
    """One entry of the table; the variant "dense" with share 1 is the model as it is."""

    variant: str
    share: float
    seed: int


@dataclass(frozen=True)
class Task:
    """What all cells have in common."""

    model: nn.Module | Callable[[int], nn.Module]
    quality: Callable[[nn.Module], float]
    variants: dict[str, Variant]
    kind: str = "params"
    example_inputs: Any = None
    data: Callable[[int], Any] | None = None
    after: Callable[[nn.Module, int], nn.Module] | None = None

    @property
    def setting(self) -> dict[str, Any]:
        """What all results in one folder have in common beside the weights, JSON-ready."""
        calls = {n: None if (f := getattr(self, n)) is None else callable_name(f) for n in ("quality", "after")}
        return {"budget": self.kind, **calls, "inputs": _digest(self.example_inputs)}

    def key(self, cell: Cell) -> str:
        """A hash of what the cell's result depends on beside the setting and the weights (:func:`fingerprint`)."""
        known: dict[str, Any] = {"variant": DENSE, "share": cell.share, "seed": cell.seed}
        if cell.variant != DENSE:
            variant = self.variants[cell.variant]
            data = callable_name(self.data) if variant.needs_data and self.data is not None else None
            known |= {"variant": variant.identity, "data": data}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:20]


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


def fingerprint(model: nn.Module) -> str:
    """Class, number of parameters and CRC-32 of names and values of the state dict."""
    total = 0
    for name, value in model.state_dict().items():
        tensor = isinstance(value, Tensor) and not value.is_meta
        text = f"{name} {tuple(value.shape)} {value.dtype} {crc32(value)}" if tensor else name
        total = zlib.crc32(text.encode(), total)
    return f"{type(model).__name__}, {count_params(model):,} parameters, crc {total:08x}"


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
    analysis = _defaults(analyze, ())
    planning = _defaults(Analysis.plan, (*SHARES, "error", "example_inputs"))
    known = {**analysis, **planning, "refit": False}
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
    return Variant(name, analysing, chosen, **switches)


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
    found, refused = {}, []
    for method, criterion, p in itertools.product(methods, criteria, ps):
        norm = "p" if p is None else f"p={p:g}"
        words = [method, *([str(criterion)] if len(criteria) > 1 else []), *([norm] if len(ps) > 1 else [])]
        try:
            check_plan_options(shares, None, example_inputs, method=method, criterion=criterion, p=p)
        except ArgumentError as e:
            refused.append(f"{' '.join(words)} ({e})")
            continue
        found[" ".join(words)] = {**options, "method": method, "criterion": criterion, "p": p}
    if refused:
        warnings.warn(f"left out of the evaluation: {'; '.join(refused)}", stacklevel=3)
    if not found:
        raise ArgumentError(f"no combination of methods={methods}, criteria={criteria}, ps={ps} goes together")
    return found


def check_cells(budgets: Sequence[float], budget: str, seeds: Sequence[int], example_inputs: Any) -> None:
    """ArgumentError or BudgetError unless these are shares in (0, 1], a kind of budget and different seeds."""
    if budget not in KINDS:
        raise ArgumentError(f"budget={budget!r} is not one of {', '.join(KINDS)}")
    if budget == "flops" and example_inputs is None:
        raise ArgumentError("budget='flops' needs example_inputs=, a tensor, tuple or dict as model(...) takes it")
    if isinstance(budgets, str) or not isinstance(budgets, Sequence) or not budgets:
        raise BudgetError(f"budgets={budgets!r}: expected a list of shares in (0, 1], for example (0.5, 0.3)")
    for share in budgets:
        if not isinstance(share, Real) or isinstance(share, bool) or not 0 < share <= 1:
            raise BudgetError(f"budgets: {share!r} is outside (0, 1]: it is the share of {SHARES[budget]}")
    whole = isinstance(seeds, Sequence) and all(isinstance(s, Integral) and not isinstance(s, bool) for s in seeds)
    if not whole or not seeds or any(s < 0 for s in seeds):
        raise ArgumentError(f"seeds={seeds!r}: expected a list of integers >= 0")
    for name, values in (("budgets", budgets), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise ArgumentError(f"{name}={values!r} holds the same value twice")
