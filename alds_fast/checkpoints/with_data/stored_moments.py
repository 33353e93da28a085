"""Moments in the journal: those of one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...criteria import GRADIENTS, INPUTS, Moments
from ...layers import DecomposableLayer
from ..stored_values import MOMENT_NUMBERS, MOMENT_TENSORS, tensors_of_moments
from ..streaming.journal import Journal

_ALL = "collected"


class StoredMoments(Mapping[str, Moments]):
    """What :func:`alds_fast.criteria.collect_by_blocks` gives, kept part after part, and read layer by layer."""

    def __init__(
        self, journal: Journal, layers: Mapping[str, DecomposableLayer], gradients: bool, read: Callable[[], None]
    ) -> None:
        """``read`` is called before a layer's moments are read; ``gradients``: whether these are collected."""
        self.journal, self.layers, self.gradients, self._read = journal, layers, gradients, read
        self._notes: dict[str, tuple[int, dict[str, Any]]] = {}  # by layer, with the number of its part
        self._noises: dict[str, float] = {}
        self._last: tuple[str, Moments] | None = None

    def has(self, kind: str, part: int) -> bool:
        """Whether a part's results are in the journal."""
        return self.journal.has(kind, part)

    def keep(self, kind: str, part: int, results: Mapping[str, Any]) -> None:
        """Write a part's results to the journal."""
        self.journal.put(kind, part, *(tensors_of_moments(results) if kind == INPUTS else _of_gradients(results)))

    @property
    def complete(self) -> bool:
        """Whether all parts are in the journal; one that was damaged and removed is not."""
        if not self.journal.has(_ALL, 0):
            return False
        kinds = (INPUTS, GRADIENTS) if self.gradients else (INPUTS,)
        return all(self.has(kind, part) for kind in kinds for part in range(self.journal.notes(_ALL, 0)["parts"]))

    def finish(self, parts: int) -> None:
        """So many parts were all."""
        self.journal.put(_ALL, 0, {}, {"parts": parts})

    def _index(self) -> dict[str, tuple[int, dict[str, Any]]]:
        if not self._notes:
            for part in range(self.journal.notes(_ALL, 0)["parts"]):
                self._notes |= {name: (part, note) for name, note in self.journal.notes(INPUTS, part).items()}
                if self.gradients:
                    self._noises |= self.journal.notes(GRADIENTS, part)
        return self._notes

    def __getitem__(self, name: str) -> Moments:
        if self._last is None or self._last[0] != name:
            part, note = self._index()[name]
            self._last = None
            self._read()
            self._last = name, self._moments(name, part, note)
        return self._last[1]

    def _moments(self, name: str, part: int, note: dict[str, Any]) -> Moments:
        names = {field: note["tensors"][field] for field in MOMENT_TENSORS if field in note["tensors"]}
        tensors: dict[str, Any] = self.journal.some(INPUTS, part, names)
        numbers = {field: note[field] for field in MOMENT_NUMBERS}
        gradient, noise = None, 0.0
        if self.gradients and name in self._noises:
            gradient = self.journal.some(GRADIENTS, part, {"": name})[""]
            noise = self._noises[name]
        elif self.gradients:  # what matters does not depend on this layer
            shape = self.layers[name].shape
            gradient = torch.zeros(shape.conv_groups, shape.filters_per_group, dtype=torch.float64, device="cpu")
        return Moments(**{"second": None, **tensors, **numbers}, gradient=gradient, gradient_noise=noise)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index())

    def __len__(self) -> int:
        return len(self._index())


def _of_gradients(results: Mapping[str, tuple[Tensor, float]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {name: tensor for name, (tensor, _) in results.items()}, {
        name: noise for name, (_, noise) in results.items()
    }
