"""What the checks of an earlier call found and chose: a call of the same kind has nothing left to do but to launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .limits import precision
from .op_shared import PLAIN, holds_values, is_watched
from .tilings import tables_changed

_T = TypeVar("_T")
STRIDED = torch.strided
_MOST = 4096  # kinds of calls that are kept; beyond them all are found anew
_known: dict[tuple, Callable[..., Any]] = {}


def kind_key(options: tuple, tensors: Sequence[Tensor | None]) -> tuple | None:
    """All that a call's checks, its choice of a backend and its launches depend on; None where it must be looked at.

    It must be where gradients, autocast, modes, tracers, functorch transforms, profilers or subclasses of tensors are
    at work, for tensors without data, and on another device than the current one.
    """
    if is_watched() or torch._C._is_any_autocast_enabled():
        return None
    x, graded = tensors[0], torch.is_grad_enabled()
    if not holds_values(x) or x.is_meta or (x.is_cuda and x.get_device() != torch.cuda.current_device()):
        return None
    device = x.device
    key: list[Any] = [options, device, precision(), tables_changed()]
    for t in tensors:  # what holds_values says, without a call for each
        if t is None:
            key.append(None)
        elif (
            type(t) in PLAIN
            and t.layout is STRIDED
            and t.device == device
            and not (t.is_neg() or (graded and t.requires_grad))
        ):
            key.append((t.shape, t.stride(), t.dtype, t.data_ptr() % 16))
        else:
            return None
    return tuple(key)


def known_call(key: tuple | None) -> Callable[..., Any] | None:
    """What :func:`keep_call` kept for the key."""
    return None if key is None else _known.get(key)


def keep_call(key: tuple, call: Callable[..., _T]) -> Callable[..., _T]:
    """``call``, which calls with this key are from here on; it must hold none of their tensors."""
    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = call
    return call
