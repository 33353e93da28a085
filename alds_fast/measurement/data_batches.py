"""Batches of data that a model is run on: what they must be, and what a failed run says."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ModelError
from .private_runs import keeping_random_state


@contextmanager
def naming_batch(number: int, name: str) -> Iterator[None]:
    """What a model raises on a batch, by its number from 1, becomes a ModelError."""
    try:
        yield
    except (ArgumentError, ModelError):
        raise
    except Exception as e:
        raise ModelError(
            f"batch {number} of {name} did not run through the model ({type(e).__name__}: {e}); a batch is what "
            f"model(...) takes, without labels"
        ) from e


def numbered_batches(data: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """The batches, one more time, with their numbers from 1; ArgumentError if there are none any more."""
    number = 0
    for number, batch in enumerate(data, 1):
        yield number, batch
    if not number:
        raise ArgumentError("refit= had batches once, and then none: each layer takes a pass; give a list of them")


def check_data(data: Any) -> None:
    """ArgumentError for what is no iterable of batches."""
    if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise ArgumentError(f"data is a {type(data).__name__}: expected an iterable of batches, for example [x]")


def first_batch(model: nn.Module, data: Iterable[Any] | None) -> tuple[Any, Iterable[Any] | None]:
    """The first of the batches, None without any, and all of them: of an iterator another one, which begins there.

    Random numbers go on as if nothing had been drawn.
    """
    if data is None:
        return None, None
    with keeping_random_state(model):  # a loader draws from the random numbers
        batches = iter(data)
        first = next(batches, None)
    return first, itertools.chain([first], batches) if batches is data and first is not None else data


def check_batches(data: Any, name: str = "refit=") -> None:
    """ArgumentError, which calls the batches ``name``, unless they can be gone through again and again."""
    if not isinstance(data, Iterable) or isinstance(data, Tensor | Mapping | str):
        raise ArgumentError(f"{name} is a {type(data).__name__}: expected batches, for example [x]")
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed
        once = iter(data) is data
    if once:
        raise ArgumentError(f"{name} is an iterator, which can be used once only; give a list of the batches")
