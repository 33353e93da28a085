"""Which rows of a batch an expert is called with, for hooks on its layers.

A router gives an expert some tokens, in an order of its own. Masks of padding and samples kept aside are of the batch,
so that who looks at an expert's rows has to know which ones these are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor


class Routed(NamedTuple):
    """Row i of an expert's input is the batch's row ``rows[i]``, of ``total``, sample after sample."""

    rows: Tensor
    total: int

    def of_all(self, flags: Tensor) -> Tensor | None:
        """Of flags for all rows of the batch, in any shape, those of the expert's; None if they are not as many."""
        return flags.flatten().to(self.rows.device)[self.rows] if flags.numel() == self.total else None

    def same(self, other: Routed | None) -> bool:
        """Whether the same rows, in the same order, were given to another call."""
        return other is not None and self.total == other.total and torch.equal(self.rows, other.rows)


_ROUTED: ContextVar[Routed | None] = ContextVar("alds_fast.routed", default=None)


def routed_rows() -> Routed | None:
    """Of the expert that is being called, its rows; None outside of one."""
    return _ROUTED.get()


@contextmanager
def calling_expert(rows: Tensor, total: int) -> Iterator[None]:
    """Inside, :func:`routed_rows` tells these."""
    token = _ROUTED.set(Routed(rows, total))
    try:
        yield
    finally:
        _ROUTED.reset(token)
