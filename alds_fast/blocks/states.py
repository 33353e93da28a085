"""What blocks have returned, kept until the blocks after them are run."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

MEMORY = 1 << 30  # bytes that one walk keeps in memory; what is beyond lies in files


class Blank(NamedTuple):
    """What a tensor looked like, whose values nobody will ask for."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def tensor(self) -> Tensor:
        """Zeros of that shape, which take no memory."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)


class Held(NamedTuple):
    """A tensor's values, and where it was."""

    values: Tensor
    device: torch.device

    def tensor(self) -> Tensor:
        """A copy with the same values, strides and device, which may be written to."""
        return self.values.clone() if self.values.device == self.device else self.values.to(self.device)


class Room:
    """Keeps tensors in memory, and from ``limit`` bytes on in files, which are gone when their tensors are."""

    def __init__(self, limit: int = MEMORY) -> None:
        self.limit, self.used = limit, 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0

    def begin(self) -> None:
        """From here on other tensors are kept; those before may be let go."""
        self.used = 0

    def keep(self, tensor: Tensor) -> Held:
        """The values as they are now."""
        tensor, size = tensor.detach(), tensor.numel() * tensor.element_size()
        if self.used + size <= self.limit or not size:
            self.used += size
            return Held(tensor.clone(), tensor.device)
        values = tensor.cpu()
        strides = torch.empty_like(values, device="meta").stride()  # of a tensor without gaps, in the same order
        file = self._file(values.numel(), values.dtype).as_strided(values.shape, strides)
        return Held(file.copy_(values), tensor.device)

    def _file(self, count: int, dtype: torch.dtype) -> Tensor:
        """A tensor whose memory is that of a new file."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="alds_fast_", ignore_cleanup_errors=True)
        path = Path(self._folder.name) / f"{self._files}"
        self._files += 1
        tensor = torch.from_file(str(path), shared=True, size=count, dtype=dtype, device="cpu")
        with suppress(OSError):  # it is there until the tensor is gone; where that is not allowed, until the folder is
            path.unlink()
        return tensor


def keep(value: Any, room: Room) -> Any:
    """A block's output with its tensors kept."""
    return tree_map(lambda part: room.keep(part) if isinstance(part, Tensor) else part, value)


def blank(value: Any) -> Any:
    """A block's output, of which only the shapes are kept."""
    return tree_map(lambda t: Blank(t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t, value)


def emptied(value: Any) -> Any:
    """What :func:`keep` has made, of which only the shapes are kept."""
    return tree_map(
        lambda part: Blank(part.values.shape, part.values.dtype, part.device) if isinstance(part, Held) else part,
        value,
        is_leaf=lambda x: isinstance(x, Held),
    )


def restored(value: Any) -> Any:
    """A block's output as it was given to :func:`keep` or :func:`blank`, what nobody asks for as zeros."""
    kinds = Blank, Held
    return tree_map(
        lambda part: part.tensor() if isinstance(part, kinds) else part, value, is_leaf=lambda x: isinstance(x, kinds)
    )
