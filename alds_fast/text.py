"""Plain-text tables."""

from __future__ import annotations

import difflib
import html
import math
from collections.abc import Iterable, Sequence


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Columns padded to their widest cell, those in ``left`` to the left, the others to the right.

    >>> print(table(["name", "n"], [["a", "1"], ["bb", "20"]]))
    name   n
    ---------
    a      1
    bb    20
    """
    widths = [max(len(r[i]) for r in [headers, *rows]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(padded).rstrip()

    head = line(headers)
    return "\n".join([head, "-" * (len(head) + 1), *map(line, rows)])


def shape_text(shape: Sequence[int]) -> str:
    """A shape as 64x3x7x7."""
    return "x".join(map(str, shape)) or "-"


def number(value: float | None) -> float | str | None:
    """JSON for a number: null for NaN and None, "inf" for infinity."""
    return None if value is None or math.isnan(value) else "inf" if math.isinf(value) else value


def meant(word: str, known: Iterable[str]) -> str:
    """A question after the word that is most like this one; nothing where none is.

    >>> meant("param", ["params", "error"])
    "; did you mean 'params'?"
    """
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def size_text(size: int) -> str:
    """Bytes for people.

    >>> size_text(2_500_000_000), size_text(4096)
    ('2.5 GB', '4,096 bytes')
    """
    return f"{size / 1e9:.3g} GB" if size >= 10_000_000 else f"{size:,} bytes"


class ShownInNotebooks:
    """What is printed as a table is shown as one in a notebook."""

    def _repr_html_(self) -> str:
        return f'<pre style="white-space: pre">{html.escape(str(self))}</pre>'
