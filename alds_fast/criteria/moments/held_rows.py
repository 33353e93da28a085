"""Rows of samples that are kept aside, on which errors are tried."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST_ROWS, MOST_CALL_ROWS = 1024, 256  # of a layer that are kept, and of a call that are looked at


class HeldRows:
    """A layer's rows on samples kept aside, (rows, groups, n): all, or evenly spread ones of more than 1,024.

    Which these are does not depend on the order of the batches, or on which process has seen them.
    """

    def __init__(self) -> None:
        self._places = torch.empty(0, dtype=torch.int64, device="cpu")
        self._parts: list[Tensor] = []
        self._step = 1

    @staticmethod
    def wanted(rows: int) -> int:
        """How many of a call's rows are looked at."""
        return min(rows, MOST_CALL_ROWS)

    def add(self, rows: Tensor, number: int) -> None:
        """Take up rows of one more call, on the batch of that number."""
        kind, first = rows.dtype if rows.dtype == torch.float64 else torch.float32, number * (MOST_CALL_ROWS + 1)
        at = slice(-first % self._step, None, self._step)
        places = torch.arange(first, first + len(rows), device="cpu")[at]
        self._take(places, [rows.detach()[at].to("cpu", kind)])

    def _take(self, places: Tensor, parts: Sequence[Tensor]) -> None:
        self._places = torch.cat([self._places, places])
        self._parts += parts
        while len(self._places) > MOST_ROWS:
            self._step *= 2
            kept = self._places % self._step == 0
            self._places, self._parts = self._places[kept], [torch.cat(self._parts)[kept]]

    @classmethod
    def of_all(cls, parts: Sequence[HeldRows]) -> HeldRows:
        """What one would have that had taken up the rows of all."""
        whole = cls()
        whole._step = max(part._step for part in parts)
        for part in parts:
            kept = part._places % whole._step == 0
            whole._take(part._places[kept], [torch.cat(part._parts)[kept]] if len(part._places) else [])
        return whole

    def rows(self) -> Tensor | None:
        """What there is, in the order of the batches; None if nothing is."""
        return torch.cat(self._parts)[self._places.argsort(stable=True)] if len(self._places) else None
