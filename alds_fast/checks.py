"""Questions about arguments that several functions ask."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from numbers import Integral, Real
from typing import ParamSpec, TypeGuard, TypeVar

import torch
from torch import nn

from .errors import ArgumentError, ModelError

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number, of any type but bool, that a float can hold."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def is_share(value: object) -> TypeGuard[float]:
    """Whether it is a number in (0, 1]."""
    return is_number(value) and 0 < value <= 1


def is_count(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether it is an integer of at least ``least``, of any type but bool."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_model(model: object) -> None:
    """ModelError unless it is a module whose parts can be replaced."""
    if isinstance(model, str | os.PathLike):
        raise ModelError(
            f"model={os.fspath(model)!r} is a text; pass the torch.nn.Module itself: a file that save wrote gives it "
            f"by load(file, dense_model), a checkpoint directory is compressed by compress_checkpoint(source, output)"
        )
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is a {type(model).__name__}; pass the torch.nn.Module itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "model is a ScriptModule, compiled code whose layers cannot be replaced; pass the torch.nn.Module that it "
            "was made from, then script or trace the result"
        )


def explaining(**remedies: str) -> Callable[[Callable[_Given, _Result]], Callable[_Given, _Result]]:
    """A function that says, by argument name, what to do about arguments that it lacks or that are missing.

    An ArgumentError takes the place of Python's TypeError. The signature stays as it is.

    >>> @explaining(share="share= is called keep= here")
    ... def cut(*, keep): ...
    >>> cut(share=0.5)
    Traceback (most recent call last):
    alds_fast.errors.ArgumentError: cut: share= is called keep= here
    """

    def decorate(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as e:
                wrong = [name for name in remedies if name in kwargs or f"'{name}'" in str(e)]
                if wrong:
                    raise ArgumentError(f"{function.__name__}: {remedies[wrong[0]]}") from e
            return function(*args, **kwargs)

        return call

    return decorate
