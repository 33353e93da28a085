"""The samples of batches: which are the same or hardly differ, and which are kept aside."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .run_model import exact_products

LEAST_SAMPLES = 3  # from which something is known of others
TWO_ASIDE = 6  # samples of which two at least are kept aside
ALIKE = 0.1  # of a sample's norm: what is no farther from another one tells next to nothing new
NEAR = 0.1  # the same, of how far most samples are from one another
_MOST, _DIRECTIONS = 4096, 32
MAX_DEPTH = 6  # of containers in containers


def leaves_of(value: Any, depth: int = 0) -> Iterator[Any]:
    """The tensors and plain values in a batch, in whatever mappings, sequences and objects they are."""
    if isinstance(value, Tensor | str | bytes) or depth > MAX_DEPTH:
        yield value
    elif isinstance(value, Mapping):
        for key in value:
            yield from leaves_of(value[key], depth + 1)
    elif isinstance(value, Iterable):
        for part in value:
            yield from leaves_of(part, depth + 1)
    elif hasattr(value, "__dict__"):
        yield from leaves_of(vars(value), depth + 1)
    else:
        yield value


def sample_count(batch: Any) -> int:
    """How many samples a batch has: the first size of its first tensor of two or more dimensions, or of one.

    >>> sample_count({"ids": torch.zeros(4, 9), "positions": torch.zeros(9)}), sample_count((torch.ones(()),))
    (4, 1)
    """
    tensors = [leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    first = next((t for t in tensors if t.dim() > 1), tensors[0] if tensors else None)
    return 1 if first is None else first.shape[0]


def _bytes(value: Any) -> bytes:
    if not isinstance(value, Tensor):
        return repr(value).encode()
    if value.layout != torch.strided or value.is_meta or value.is_nested:
        return str(value).encode()
    dense = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return str((value.dtype, value.shape)).encode() + dense.view(-1).view(torch.uint8).numpy().tobytes()


def _names(value: Any, depth: int = 0) -> str:
    """How a batch is put together: names and types of what is in it."""
    if isinstance(value, Mapping) and depth <= MAX_DEPTH:
        return f"{{{', '.join(f'{key}: {_names(value[key], depth + 1)}' for key in value)}}}"
    if isinstance(value, tuple | list) and depth <= MAX_DEPTH:
        return f"({', '.join(_names(part, depth + 1) for part in value)})"
    return type(value).__name__


def digest_of(batch: Any) -> bytes:
    """What tells a batch from others: of its names and the values of all its tensors."""
    digest = hashlib.blake2b(_names(batch).encode(), digest_size=16)
    for leaf in leaves_of(batch):
        digest.update(_bytes(leaf))
    return digest.digest()


def _marks(batch: Any) -> list[bytes]:
    """A digest of every sample."""
    count, leaves = sample_count(batch), list(leaves_of(batch))
    marks = []
    for i in range(count):
        digest = hashlib.blake2b(digest_size=8)
        for leaf in leaves:
            by_sample = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == count
            digest.update(_bytes(leaf[i] if by_sample else leaf))
        marks.append(digest.digest())
    return marks


class _Sketches:
    """Samples by what their numbers look like: those that hardly differ from one before are told.

    Of every sample's floating-point numbers up to ``_MOST`` are projected to ``_DIRECTIONS`` random directions, between
    which distances are kept to some 10 %.
    """

    def __init__(self) -> None:
        self.sketches: dict[int, Tensor] = {}
        self.marks: dict[int, list[bytes]] = {}

    def alike(self, batch: Any, marks: Sequence[bytes]) -> list[bytes]:
        """For each sample its mark, or that of the first that it is alike."""
        numbers = _numbers(batch, len(marks))
        if numbers is None:
            return list(marks)
        width = numbers.shape[1]
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(width, _DIRECTIONS, generator=generator, dtype=torch.float32, device="cpu")
        directions /= _DIRECTIONS**0.5
        with exact_products():
            new = numbers @ directions
        names = self.marks.setdefault(width, [])
        known = torch.cat([self.sketches.get(width, new[:0]), new])
        apart = torch.cdist(new, known, compute_mode="donot_use_mm_for_euclid_dist")
        near = apart < (ALIKE * new.norm(dim=1, keepdim=True)).clamp_min(NEAR * _typical(known))
        near[:, len(names) :] = near[:, len(names) :].tril(-1)  # of this batch those before
        labels = [*names, *marks]
        for row in range(len(marks)):
            alike = near[row].nonzero()
            if len(alike):
                labels[len(names) + row] = labels[int(alike[0])]
        fresh = [row for row, mark in enumerate(marks) if mark not in names and not bool(near[row].any())]
        found = labels[len(names) :]
        self.sketches[width] = torch.cat([known[: len(names)], new[fresh]])
        names += [marks[row] for row in fresh]
        return found


def _typical(sketches: Tensor) -> float:
    """The upper quartile of the distances of (up to 256 of) the samples, so that several clusters are no matter."""
    some = sketches[:: -(-len(sketches) // 256)]
    return float(torch.pdist(some).quantile(0.75)) if len(some) > 2 else 0.0


def _numbers(batch: Any, count: int) -> Tensor | None:
    """The floating-point numbers of every sample, (samples, numbers) of float32 on the CPU; None without any."""
    leaves = [leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == count]
    if not count or not leaves or not all(leaf.is_floating_point() and leaf.layout == torch.strided for leaf in leaves):
        return None
    rows = torch.cat([leaf.detach().reshape(count, -1).cpu().float() for leaf in leaves], 1)
    rows = rows[:, :: -(-rows.shape[1] // _MOST)]
    return rows if bool(rows.isfinite().all()) else None


class Samples:
    """Of batch after batch, which samples are kept aside: a share of those that differ, one at least of two.

    A sample that comes again is on the side where it was. Batches may come in several passes.
    """

    def __init__(self, share: float) -> None:
        self.share, self.total = share, 0
        self._sketches = _Sketches()
        self._aside: dict[bytes, bool] = {}

    @property
    def distinct(self) -> int:
        """How many differ."""
        return len(self._aside)

    @property
    def worth(self) -> float:
        """How much of the rows tells something new: of repeated samples one, and of fewer than three to use none.

        Rows of one sample are alike, so that they do not tell how far others are.
        """
        return self.distinct / self.total if self.distinct - self.kept_aside >= LEAST_SAMPLES else 0.0

    @property
    def kept_aside(self) -> int:
        """How many of those that differ are kept aside."""
        return sum(self._aside.values())

    def aside(self, batch: Any) -> Tensor:
        """Whether each sample of the batch is kept aside, (samples,) of bool on the CPU."""
        marks = self._sketches.alike(batch, _marks(batch))
        self.total += len(marks)
        new = [mark for mark in dict.fromkeys(marks) if mark not in self._aside]
        distinct = len(self._aside) + len(new)
        least = (int(distinct > 1) + int(distinct >= TWO_ASIDE)) if self.share > 0 else 0
        wanted = max(int(distinct * self.share), least) - self.kept_aside
        first = len(new) - min(wanted, len(new) - (not self._aside))
        self._aside |= {mark: i >= first for i, mark in enumerate(new)}
        return torch.tensor([self._aside[mark] for mark in marks], device="cpu")
