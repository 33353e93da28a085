"""Batches of data that a model is run on: what they must be, and what a failed run says."""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
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
            f"model(...) takes, without labels; of pairs (x, y) pass [x for x, y in loader]"
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
        remedy = '; of text [tokenizer(text, return_tensors="pt")]' if isinstance(data, str) else ""
        kind = type(data).__name__
        raise ArgumentError(f"data is a {kind}: expected an iterable of batches, for example [x]{remedy}")


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


def without_labels(model: nn.Module, data: Iterable[Any]) -> Iterable[Any]:
    """The batches, those that are inputs and labels without the labels.

    Of a tuple or list with more values than the positional arguments that the model's forward takes, as loaders of
    datasets with labels give them, it is the first ones. Or the last of these would be an optional mask and cannot be
    one: an integer for each of the first value's samples, which have rows of their own.

    >>> without_labels(nn.Linear(2, 2), [(torch.ones(1, 2), torch.zeros(1)), torch.ones(1, 2)])
    [tensor([[1., 1.]]), tensor([[1., 1.]])]
    """
    if isinstance(data, list | tuple):
        return [_inputs_of(model, batch) for batch in data]
    return map(partial(_inputs_of, model), data) if hasattr(data, "__next__") else _WithoutLabels(model, data)


class _WithoutLabels:
    """Batches of a loader that can be gone through again."""

    def __init__(self, model: nn.Module, data: Iterable[Any]) -> None:
        self._model, self._data = model, data

    def __iter__(self) -> Iterator[Any]:
        return map(partial(_inputs_of, self._model), self._data)

    def __length_hint__(self) -> int:
        return operator.length_hint(self._data)


def _inputs_of(model: nn.Module, batch: Any) -> Any:
    if not isinstance(batch, tuple | list):
        return batch
    taken = next((n for n in range(len(batch), 0, -1) if _takes(model, batch[:n])), len(batch))
    if taken > 1 and _takes(model, batch[: taken - 1]) and _has_labels_for_mask(model, batch[:taken]):
        taken -= 1
    if taken == len(batch):
        return batch
    return batch[0] if taken == 1 and isinstance(batch[0], Tensor) else batch[:taken]


def _takes(model: nn.Module, values: Sequence[Any]) -> bool:
    try:
        inspect.signature(model.forward).bind(*values)
    except ValueError:  # a forward that does not tell
        return True
    except TypeError:
        return False
    return True


def _has_labels_for_mask(model: nn.Module, batch: Sequence[Any]) -> bool:
    """Whether a forward that takes the batch would get classes (samples,) where it takes a mask of rows or tokens."""
    first, last = batch[0], batch[-1]
    if not isinstance(first, Tensor) or not isinstance(last, Tensor) or last.dtype not in (torch.int64, torch.int32):
        return False
    with_rows = first.dim() > (2 if first.is_floating_point() else 1)  # (rows, channels) may be one sample's
    try:
        name = list(inspect.signature(model.forward).bind(*batch).arguments)[-1]
    except ValueError:
        return False
    return with_rows and "mask" in name and last.shape == first.shape[:1]
