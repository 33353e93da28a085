"""What blocks have returned, kept until the blocks after them are run."""

from __future__ import annotations

import os
import tempfile
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

    def blank(self) -> Blank:
        """What it looked like."""
        return Blank(self.values.shape, self.values.dtype, self.device)

    def tensor(self) -> Tensor:
        """A copy with the same values, strides and device, which may be written to."""
        return self.values.clone() if self.values.device == self.device else self.values.to(self.device)


class Filed(NamedTuple):
    """A tensor whose values lie in a file, from ``offset`` on, in the order of its strides."""

    file: Any
    offset: int
    like: Tensor  # on the meta device
    device: torch.device

    def blank(self) -> Blank:
        """What it looked like."""
        return Blank(self.like.shape, self.like.dtype, self.device)

    def tensor(self) -> Tensor:
        """It is read anew."""
        values = torch.empty_like(self.like, device="cpu")
        self.file.seek(self.offset)
        self.file.readinto(_bytes_of(values))
        return values.to(self.device)


def _bytes_of(tensor: Tensor) -> Any:
    """The memory of a tensor without gaps, in the order of its strides."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


Kept = Held | Filed
_ANY = Blank, Held, Filed


class Room:
    """Keeps tensors in memory, and from ``limit`` bytes on in files, which are gone when their tensors are.

    ``folder``: where these files are, by default where the system has temporary ones.
    """

    def __init__(self, limit: int = MEMORY, folder: Path | None = None) -> None:
        self.limit, self.folder, self.used = limit, folder, 0
        self._file: Any = None

    def begin(self) -> None:
        """From here on other tensors are kept; those before may be let go."""
        self.used, self._file = 0, None

    def keep(self, tensor: Tensor) -> Kept:
        """The values as they are now."""
        tensor, size = tensor.detach(), tensor.numel() * tensor.element_size()
        if self.used + size <= self.limit or not size:
            self.used += size
            return Held(tensor.clone(), tensor.device)
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - open as long as its tensors are
        like = torch.empty_like(tensor, device="meta")  # without gaps, in the same order
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(_bytes_of(torch.empty_like(like, device="cpu").copy_(tensor)))
        return Filed(self._file, offset, like, tensor.device)


def keep(value: Any, room: Room) -> Any:
    """A block's output with its tensors kept."""
    return tree_map(lambda part: room.keep(part) if isinstance(part, Tensor) else part, value)


def blank(value: Any) -> Any:
    """A block's output, of which only the shapes are kept."""
    return tree_map(lambda t: Blank(t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t, value)


def emptied(value: Any) -> Any:
    """What :func:`keep` has made, of which only the shapes are kept."""
    return tree_map(
        lambda part: part.blank() if isinstance(part, Kept) else part,
        value,
        is_leaf=lambda x: isinstance(x, _ANY),
    )


def restored(value: Any) -> Any:
    """A block's output as it was given to :func:`keep` or :func:`blank`, what nobody asks for as zeros."""
    return tree_map(
        lambda part: part.tensor() if isinstance(part, _ANY) else part, value, is_leaf=lambda x: isinstance(x, _ANY)
    )
