"""Ascending numbers as text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...errors import PlanError

_SPANS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


def spans_text(numbers: Sequence[int]) -> str:
    """Ascending numbers, neighbours as from-to.

    >>> spans_text([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)


def read_spans(text: str, where: str) -> tuple[int, ...]:
    """The numbers again; PlanError unless they ascend."""
    if not _SPANS.fullmatch(text):
        raise PlanError(f"{where}: kept={text[:40]!r} is not like '0-2,5,7-8'")
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    numbers = [number for span in ends for number in range(span[0], span[-1] + 1)]
    if numbers != sorted(set(numbers)) or any(span[0] > span[-1] for span in ends):
        raise PlanError(f"{where}: kept={text[:40]!r} does not ascend")
    return tuple(numbers)
