"""The samples of batches: which are the same, and which are kept aside."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

MAX_DEPTH = 6  # of containers in containers


def _leaves(value: Any, depth: int = 0) -> Iterator[Any]:
    """The tensors and plain values in a batch, in whatever mappings, sequences and objects they are."""
    if isinstance(value, Tensor | str | bytes) or depth > MAX_DEPTH:
        yield value
    elif isinstance(value, Mapping):
        for key in value:
            yield from _leaves(value[key], depth + 1)
    elif isinstance(value, Iterable):
        for part in value:
            yield from _leaves(part, depth + 1)
    elif hasattr(value, "__dict__"):
        yield from _leaves(vars(value), depth + 1)
    else:
        yield value


def sample_count(batch: Any) -> int:
    """How many samples a batch has: the common first size of its tensors; 1 where they have none in common.

    >>> sample_count({"ids": torch.zeros(4, 9), "positions": torch.zeros(1, 9)}), sample_count((torch.ones(()),))
    (4, 1)
    """
    sizes = {leaf.shape[0] for leaf in _leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()} - {1}
    return sizes.pop() if len(sizes) == 1 else 1


def first_sample(batch: Any) -> Any:
    """The batch with its first sample alone, where it is made of tensors in plain containers; else the batch."""
    count = sample_count(batch)
    return tree_map_only(Tensor, lambda t: t[:1] if t.dim() and t.shape[0] == count else t, batch)


def _bytes(value: Any) -> bytes:
    if not isinstance(value, Tensor):
        return repr(value).encode()
    if value.layout != torch.strided or value.is_meta or value.is_nested:
        return str(value).encode()
    dense = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return str((value.dtype, value.shape)).encode() + dense.view(-1).view(torch.uint8).numpy().tobytes()


def _marks(batch: Any) -> list[bytes]:
    """A digest of every sample."""
    count, leaves = sample_count(batch), list(_leaves(batch))
    marks = []
    for i in range(count):
        digest = hashlib.blake2b(digest_size=8)
        for leaf in leaves:
            by_sample = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == count
            digest.update(_bytes(leaf[i] if by_sample else leaf))
        marks.append(digest.digest())
    return marks


class Samples:
    """Of batch after batch, which samples are kept aside: a share of those that differ, one at least of two.

    A sample that comes again is on the side where it was. Batches may come in several passes.
    """

    def __init__(self, share: float) -> None:
        self.share, self.total = share, 0
        self._aside: dict[bytes, bool] = {}

    @property
    def distinct(self) -> int:
        """How many differ."""
        return len(self._aside)

    @property
    def kept_aside(self) -> int:
        """How many of those that differ are kept aside."""
        return sum(self._aside.values())

    def aside(self, batch: Any) -> Tensor:
        """Whether each sample of the batch is kept aside, (samples,) of bool on the CPU."""
        marks = _marks(batch)
        self.total += len(marks)
        new = [mark for mark in dict.fromkeys(marks) if mark not in self._aside]
        distinct = len(self._aside) + len(new)
        wanted = max(int(distinct * self.share), int(distinct > 1 and self.share > 0)) - self.kept_aside
        first = len(new) - min(wanted, len(new) - (not self._aside))
        self._aside |= {mark: i >= first for i, mark in enumerate(new)}
        return torch.tensor([self._aside[mark] for mark in marks], device="cpu")
