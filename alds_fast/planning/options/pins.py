"""Pins: what a plan may take of single layers, whatever the budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...allocation import BASELINES, Candidates, candidates, least_error_of_pivots
from ...checks import is_count, is_number, is_share
from ...criteria import Errors
from ...errors import ArgumentError, BudgetError
from ...layers import DecomposableLayer, Layer, decomposable, label
from ...selection import ModuleNames, patterns

_DENSE = "dense"
_RANKS, _SHARES = ("min_rank", "max_rank"), ("min_keep", "max_keep")
_EXAMPLE = "for example {'layer4.*': 'dense', 'head': {'max_rank': 64}, '*.q_proj': {'min_keep': 0.5}}"


@dataclass(frozen=True)
class Pin:
    """What the pins of one layer allow together; a layer that stays dense is of full rank and keeps all.

    Attributes:
        said: by pattern, what was asked for.
        dense: it stays dense.
        min_rank, max_rank: of each slice.
        min_keep, max_keep: shares of the weight's parameters.
    """

    said: Mapping[str, Any] = field(default_factory=dict)
    dense: bool = False
    min_rank: int = 1
    max_rank: int | None = None
    min_keep: float = 0.0
    max_keep: float = 1.0

    @property
    def may_stay_dense(self) -> bool:
        """Whether the layer may stay dense."""
        return self.max_rank is None and self.max_keep == 1

    @property
    def limits(self) -> bool:
        """Whether some ranks are not allowed: then what is best of all ranks need not be the best of what is left."""
        return self != Pin(self.said, self.dense)

    def limit(self, layer: DecomposableLayer, choices: Candidates) -> Candidates:
        """The choices that the pin allows; ArgumentError where there are none."""
        if self.dense:
            return Candidates((), choices.dense_cost)
        costs = self.min_keep * choices.dense_cost, self.max_keep * choices.dense_cost
        limited = choices.limit((self.min_rank, self.max_rank), costs, self.may_stay_dense)
        if limited.curves or limited.may_stay_dense:
            return limited
        ranks = [int(rank) for curve in choices.curves for rank in (curve.ranks[0], curve.ranks[-1])]
        there = f"it could have ranks of {min(ranks)} to {max(ranks)}" if ranks else "no factorisation is smaller"
        raise ArgumentError(f"pins leave layer {label(layer.name)} no choice: {pins_text(self.said)}; {there}")

    @property
    def remark(self) -> str:
        """What a plan says of the layer."""
        return f"pinned: {pins_text(self.said)}"


def pins_text(pins: Mapping[str, Any]) -> str:
    """Pins in words.

    >>> pins_text({"layer4.*": "dense", "head": {"max_rank": 64, "min_keep": 0.25}})
    "'layer4.*' dense, 'head' max_rank=64 min_keep=0.25"
    """
    limits = {p: v if v == _DENSE else " ".join(f"{k}={x:g}" for k, x in v.items()) for p, v in pins.items()}
    return ", ".join(f"{p!r} {text}" for p, text in limits.items())


def read_pins(pins: object) -> dict[str, Any]:
    """Pins by pattern, as texts; ArgumentError for what is none.

    >>> read_pins({nn.Linear: {"max_rank": 8}})
    {'torch.nn.modules.linear.Linear': {'max_rank': 8}}
    """
    if pins is None:
        return {}
    if not isinstance(pins, Mapping):
        raise ArgumentError(f"pins is a {type(pins).__name__}: expected a dict by layer, {_EXAMPLE}")
    known: dict[str, Any] = {}
    for key, value in pins.items():
        known |= dict.fromkeys(patterns((key,), "pins") or (), value if value == _DENSE else _limits(key, value))
    return known


def _limits(key: object, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value or not set(value) <= {*_RANKS, *_SHARES}:
        limits = ", ".join((*_RANKS, *_SHARES))
        raise ArgumentError(f"pins[{key!r}]={value!r} is neither 'dense' nor a dict of {limits}; {_EXAMPLE}")
    for name, limit in value.items():
        if name in _RANKS and not is_count(limit):
            raise ArgumentError(f"pins[{key!r}]: {name}={limit!r} is not an integer >= 1")
        if name in _SHARES and not is_share(limit):
            raise ArgumentError(f"pins[{key!r}]: {name}={limit!r} is outside (0, 1], a share of the layer's weight")
    return {name: int(limit) if name in _RANKS else float(limit) for name, limit in value.items()}


def check_pins(pins: object, min_rank: object, method: object) -> None:
    """ArgumentError unless these are pins, which ``method`` can hold to: baselines only those that stay dense."""
    if not is_count(min_rank):
        raise ArgumentError(f"min_rank={min_rank!r} is not an integer >= 1")
    limits = [f"pins[{p!r}]" for p, value in read_pins(pins).items() if value != _DENSE]
    limits += ["min_rank="] if min_rank > 1 else []
    if method in BASELINES and limits:
        raise ArgumentError(f"{limits[0]} goes with method='alds', not {method!r}, which knows 'dense' only")


def pins_of_layers(pins: object, min_rank: int, model: nn.Module, layers: Sequence[Layer]) -> dict[str, Pin]:
    """What is asked of the layers that can be decomposed, by name.

    LayerNotFoundError for a pattern that means none of the ``layers``; ArgumentError where pins of a layer contradict
    each other, or where a pattern of limits means only layers that cannot be decomposed.
    """
    known = read_pins(pins)
    meant = _values_by_layer(known, model, layers, "pins")
    return {layer.name: _together(layer.name, meant.get(layer.name, {}), min_rank) for layer in decomposable(layers)}


def importance_of_layers(
    importance: Mapping[Any, float] | None, model: nn.Module, layers: Sequence[Layer]
) -> dict[str, float]:
    """The factors of the errors of the layers that can be decomposed, by name, 1 by default.

    Of several patterns that mean a layer the last counts. LayerNotFoundError for a pattern that means none of the
    ``layers``, ArgumentError for one that means only layers that cannot be decomposed, or a factor outside [0, inf).
    """
    for pattern, value in (importance or {}).items():
        if not (is_number(value) and 0 <= value < math.inf):
            raise ArgumentError(f"importance[{pattern!r}]={value!r} is outside [0, inf)")
    meant = _values_by_layer(importance or {}, model, layers, "importance")
    ready = [layer.name for layer in decomposable(layers)]
    return {name: float([1.0, *meant.get(name, {}).values()][-1]) for name in ready}


def _values_by_layer(
    given: Mapping[Any, Any], model: nn.Module, layers: Sequence[Layer], argument: str
) -> dict[str, dict[str, Any]]:
    """Of every layer, the values given for patterns that mean it, by pattern; raises where one means none."""
    ready = [layer.name for layer in decomposable(layers)]
    meant = ModuleNames(model).by_layer(given, [layer.name for layer in layers], argument)
    values = {pattern: value for of_layer in meant.values() for pattern, value in of_layer.items()}
    for pattern, value in values.items():
        left_out = next(layer for layer in layers if pattern in meant.get(layer.name, {}))
        if value != _DENSE and not any(pattern in meant.get(name, {}) for name in ready):
            raise ArgumentError(
                f"{argument}[{pattern!r}]={value} means no layer that can be decomposed: {label(left_out.name)} is "
                f"left out ({left_out.reason})"
            )
    return meant


def _together(name: str, said: Mapping[str, Any], min_rank: int) -> Pin:
    """The pins of a layer as one; ArgumentError where they contradict each other."""
    limits = [value for value in said.values() if value != _DENSE]
    pin = Pin(
        said,
        len(limits) < len(said),
        max((v.get("min_rank", 1) for v in limits), default=1),
        min((v["max_rank"] for v in limits if "max_rank" in v), default=None),
        max((v.get("min_keep", 0.0) for v in limits), default=0.0),
        min((v.get("max_keep", 1.0) for v in limits), default=1.0),
    )
    many = f"pins contradict each other for layer {label(name)}: {pins_text(said)}"
    if (pin.dense and not pin.may_stay_dense) or pin.min_keep > pin.max_keep:
        raise ArgumentError(many)
    if pin.max_rank is not None and pin.min_rank > pin.max_rank:
        raise ArgumentError(many)
    if pin.max_rank is not None and min_rank > pin.max_rank:
        raise ArgumentError(f"min_rank={min_rank} contradicts the pins of layer {label(name)}: {pins_text(said)}")
    return Pin(**{**vars(pin), "min_rank": max(min_rank, pin.min_rank)})


@contextmanager
def saying_what_is_pinned(pins: Mapping[str, Any], min_rank: int) -> Iterator[None]:
    """A BudgetError inside says what pins the layers are held by."""
    try:
        yield
    except BudgetError as e:
        held = [f"pins {pins_text(pins)}"] if pins else []
        held += [f"min_rank={min_rank}"] if min_rank > 1 else []
        if not held:
            raise
        raise BudgetError(f"{e}; that is with {' and '.join(held)}") from e


def choices_of(
    layers: Sequence[DecomposableLayer], errors: Sequence[Errors], weights: Mapping[str, float], align: int,
    pivots: bool, pins: Mapping[str, Pin],
) -> list[Candidates]:  # fmt: skip
    """Every choice that the layers' pins allow, with their errors times the layers' weights."""
    choices = []
    for layer, of_folds in zip(layers, errors, strict=True):
        by_fold = {key: weights[layer.name] * e for key, e in of_folds.items()}
        least = weights[layer.name] * least_error_of_pivots(layer) if pivots and not layer.is_table else None
        choices.append(pins[layer.name].limit(layer, candidates(layer.shape, by_fold, align, least, layer.stored)))
    return choices
