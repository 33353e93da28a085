"""What the checks of an earlier call found and chose: a call of the same kind has nothing left to do but to launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .limits import precision
from .op_shared import is_plain, is_watched
from .tilings import tables_changed

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
    if not is_plain(x) or x.is_meta or (x.is_cuda and x.get_device() != torch.cuda.current_device()):
        return None
    key: list[Any] = [options, x.device, precision(), tables_changed()]
    for t in tensors:
        if t is None:
            key.append(None)
        elif is_plain(t) and not (graded and t.requires_grad) and t.device == x.device:
            key.append((t.shape, t.stride(), t.dtype, t.data_ptr() % 16))
        else:
            return None
    return tuple(key)


def known_call(key: tuple | None) -> Callable[..., Any] | None:
    """What :func:`keep_call` kept for the key."""
    return None if key is None else _known.get(key)


def keep_call(key: tuple | None, call: Callable[..., Any]) -> None:
    """Calls with this key are ``call(*tensors)`` from here on; it must hold none of the tensors."""
    if key is None:
        return
    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = call
