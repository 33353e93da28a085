"""Layers of one size together: what the C++ core computes in one call."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layers import DecomposableLayer, oriented_weight
from ..linalg import matrix_shape, permute_weight


def for_threads(sizes: Sequence[int], most: int = 4) -> int:
    """The sizes of as many median problems as there are threads, ``most`` at most: each thread has one to work on."""
    return min(torch.get_num_threads(), most) * int(statistics.median(sizes)) if sizes else 0


def batches(problems: Sequence, size: Callable, key: Callable, limit: int = 0) -> Iterator[list]:
    """Consecutive problems of one key whose sizes add up to no more than ``limit`` or the largest single one."""
    limit = max(limit, *map(size, problems), 0)
    batch: list = []
    for problem in problems:
        if batch and (sum(map(size, batch)) + size(problem) > limit or key(batch[0]) != key(problem)):
            yield batch
            batch = []
        batch.append(problem)
    if batch:
        yield batch


def _weight(layer: DecomposableLayer) -> Tensor:
    return oriented_weight(layer.module)


def place(layer: DecomposableLayer) -> tuple[torch.device, torch.dtype]:
    """Where and in which type a layer is worked on: float64 if its weight is, else float32, which holds half types."""
    weight: Any = layer.module.weight
    return weight.device, torch.float64 if weight.dtype == torch.float64 else torch.float32


def computed_in_float32(layer: DecomposableLayer) -> bool:
    """Whether float32 may do: the weight is on the CPU, as other devices were not measured, and in no wider type."""
    return place(layer) == (torch.device("cpu"), torch.float32)


class FoldRoom:
    """One piece of memory that batch after batch is folded into; weights that are as they must be are not copied.

    (Fresh copies of tens of megabytes, freed between small results that stay, leave the heap full of holes.)
    """

    def __init__(self) -> None:
        self._room = torch.empty(0, device="cpu")

    def matrices(self, folds: Sequence[tuple[DecomposableLayer, int]]) -> list[Tensor]:
        """Folded weights of (layer, scheme) pairs of one place, each (conv_groups, rows, cols), until the next call."""
        sources = [permute_weight(_weight(layer), layer.shape, scheme) for layer, scheme in folds]
        device, dtype = place(folds[0][0])
        sizes = [0 if s.dtype == dtype and s.is_contiguous() else s.numel() for s in sources]
        if (self._room.device, self._room.dtype) != (device, dtype) or self._room.numel() < sum(sizes):
            self._room = torch.empty(0, device="cpu")  # give the old one back first
            self._room = torch.empty(sum(sizes), dtype=dtype, device=device)
        rooms = self._room[: sum(sizes)].split(sizes)
        for source, room in zip(sources, rooms, strict=True):
            if len(room):
                room.view(source.shape).copy_(source)
        shapes = [matrix_shape(layer.shape, scheme) for layer, scheme in folds]
        places = [room if len(room) else source for room, source in zip(rooms, sources, strict=True)]
        return [place.view(shape) for place, shape in zip(places, shapes, strict=True)]
