"""The CUDA device on which tilings are timed: in graphs, over copies of the tensors that empty its L2."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..kernels import LaunchKey, Tiling, counters_given_back
from ..measurement import Prepared, prepare, sample_ms
from ..progress import Progress
from .compilation import Compilation, compile_ahead
from .rates import Rates


class Gpu:
    """A :class:`~alds_fast.tuning.search.TuningDevice` that is there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rates = Rates.of(torch.cuda.get_device_properties(device))

    def compile(self, work: Sequence[Compilation], told: Progress) -> Mapping[tuple[LaunchKey, Tiling], str]:
        """In processes of their own."""
        return compile_ahead(work, self.rates, told)

    def prepare(self, call: Callable[[Any], Any], sets: Sequence[Any]) -> Prepared:
        """As one graph."""
        with torch.cuda.device(self.device), counters_given_back(self.device):
            return prepare(call, sets, self.device)

    def microseconds(self, prepared: Prepared, key: LaunchKey, tiling: Tiling | None, samples: int) -> float:
        """By events."""
        with torch.cuda.device(self.device):
            times = [sample_ms(prepared.run, 1, self.device) for _ in range(samples)]
        return 1e3 * statistics.median(times) / prepared.copies
