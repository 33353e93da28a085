"""Texts of the command line as the values that they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any


def integers(text: str) -> tuple[int, ...]:
    """1,2,4 as a tuple."""
    return tuple(int(part) for part in text.split(","))


def passes(text: str) -> int:
    """A number of passes, 1 or more."""
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of passes, 1 or more")
    return count


def group_counts(text: str) -> str | tuple[int, ...]:
    """divisors, or 1,2,4 as a tuple."""
    return text if text == "divisors" else integers(text)


def amount(text: str) -> int | float | str:
    """A budget: a share like 0.5, a number like 5000000, or a text like 20MB, which the budget itself checks."""
    try:
        return share_or_count(text)
    except ValueError:
        return text


def share_or_count(text: str) -> int | float:
    """A share like 0.5 or 50%, or a number like 5000000.

    >>> share_or_count("0.5"), share_or_count("50%"), share_or_count("5000000")
    (0.5, 0.5, 5000000)
    """
    if text.endswith("%"):
        return float(text[:-1]) / 100
    try:
        return int(text)
    except ValueError:
        return float(text)


def pin(text: str) -> tuple[str, Any]:
    """layers=dense, or layers=max_rank=64,min_keep=0.5, as the name or pattern and its pin.

    >>> pin("layer4.*=dense"), pin("head=max_rank=64,min_keep=0.5")
    (('layer4.*', 'dense'), ('head', {'max_rank': 64, 'min_keep': 0.5}))
    """
    layers, _, said = text.partition("=")
    if said == "dense":
        return layers, said
    try:
        return layers, {name: share_or_count(value) for name, value in (part.split("=") for part in said.split(","))}
    except ValueError as e:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither like 'layer4.*=dense' nor like 'head=max_rank=64,min_keep=0.5'"
        ) from e


def as_pins(pairs: Iterable[tuple[str, Any]] | None) -> dict[str, Any]:
    """Pins that may stand several times, limits of one pattern put together."""
    pins: dict[str, Any] = {}
    for layers, said in pairs or ():
        both = isinstance(said, dict) and isinstance(pins.get(layers), dict)
        pins[layers] = pins[layers] | said if both else said
    return pins
