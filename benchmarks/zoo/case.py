"""An architecture of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Case(NamedTuple):
    """How an architecture is built, with random weights, and an input of it: a tensor, a tuple or a dict of keywords.

    ``name`` begins with the library and a slash.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]


def image(size: int, batch: int = 1) -> Tensor:
    """A batch of square random pictures in three colours."""
    return torch.randn(batch, 3, size, size, device="cpu")


def tokens(count: int, vocabulary: int, batch: int = 2) -> Tensor:
    """Random token numbers, (batch, count)."""
    return torch.randint(vocabulary, (batch, count), device="cpu")
