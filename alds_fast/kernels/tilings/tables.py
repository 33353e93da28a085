"""What launches take instead of their first guess."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .files import read_tilings, write_tilings
from .keys import LaunchKey, Measured, Tiling

_tables: dict[torch.device, dict[LaunchKey, Tiling]] = {}  # what launches take
_measured: dict[torch.device, dict[LaunchKey, Measured]] = {}  # what the files hold
_changes = [0]  # how often what launches take has changed
_compiled_for: list[tuple[int, int]] = []  # the compute capability that tensors without data stand for


def any_tuned(device: torch.device) -> bool:
    """Whether it is worth asking: a key takes a host longer to make than this."""
    table = _tables.get(device)
    if table is None:
        table = _tables[device] = _tilings(measured(device))
    return bool(table)


def tables_changed() -> int:
    """How often what launches take has changed: what was found out about launches before that holds no longer."""
    return _changes[0]


def _take(device: torch.device, table: dict[LaunchKey, Tiling] | None) -> None:
    """Launches on the device take these from here on, None for what its file holds."""
    _changes[0] += 1
    if table is None:
        _tables.pop(device, None)
    else:
        _tables[device] = table


def tuned(device: torch.device, key: LaunchKey) -> Tiling | None:
    """The tiling that was measured to be the fastest for a launch, None where nothing was measured."""
    return _tables[device].get(key) if any_tuned(device) else None


def measured(device: torch.device) -> dict[LaunchKey, Measured]:
    """All that is known of a device, as it was when first asked for and by what this process has added."""
    if device not in _measured:
        _measured[device] = read_tilings(device)
    return _measured[device]


def _tilings(known: Mapping[LaunchKey, Measured]) -> dict[LaunchKey, Tiling]:
    return {key: one.tiling for key, one in known.items() if one.tiling is not None}


class _Asked(dict[LaunchKey, Tiling]):
    """A table that notes what is looked for."""

    keys_asked: list[LaunchKey]

    def __bool__(self) -> bool:
        return True

    def get(self, key: LaunchKey, default: Any = None) -> Any:
        if key not in self.keys_asked:
            self.keys_asked.append(key)
        return super().get(key, default)


@contextmanager
def asked(device: torch.device) -> Iterator[list[LaunchKey]]:
    """The keys with which launches on the device ask meanwhile, in their order."""
    before = _tables.get(device)
    noting = _Asked(_tilings(measured(device)) if before is None else before)
    noting.keys_asked = []
    _take(device, noting)
    try:
        yield noting.keys_asked
    finally:
        _take(device, dict(noting) if before is None else before)


@contextmanager
def using(device: torch.device, tilings: Mapping[LaunchKey, Tiling]) -> Iterator[None]:
    """Launches on the device take these meanwhile."""
    before = _tables.get(device)
    _take(device, {**(before or {}), **tilings})
    try:
        yield
    finally:
        _take(device, before)


@contextmanager
def compiling_for(capability: tuple[int, int]) -> Iterator[None]:
    """Tensors on the device "meta" stand for those of a device of that compute capability."""
    _compiled_for.append(capability)
    try:
        yield
    finally:
        _compiled_for.pop()


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device, and of "meta" inside of :func:`compiling_for`; None for others."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    return _compiled_for[-1] if device.type == "meta" and _compiled_for else None


def keep_tilings(device: torch.device, found: Mapping[LaunchKey, Measured]) -> None:
    """Launches take these from here on, and later processes too, together with what others have added to the file."""
    known = {**read_tilings(device, warn=False), **measured(device), **found}
    _measured[device] = known
    _take(device, _tilings(known))
    if device.type == "cuda":
        write_tilings(device, known)
