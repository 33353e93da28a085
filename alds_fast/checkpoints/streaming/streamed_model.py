"""A checkpoint directory on its way: its layers, where their weights are, how many are worked on at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...allocation import auto_groups
from ...criteria import for_threads, with_groups
from ...errors import WeightError
from ...files import crc32
from ...integrations import stored_names
from ...layers import DecomposableLayer, Layer, bad_values, check_weight, chosen_layers, label
from ...linalg import WeightShape
from ...planning import Pin, check_is_possible, pins_of_layers
from ...processes import World
from ...progress import Progress
from ...selection import ModuleNames
from ..safetensors_reader import DTYPES, Shards
from .journal import Journal
from .meta_model import check_stored, skeleton, untie


@dataclass(frozen=True)
class Settings:
    """What decides the result."""

    budget: Mapping[str, float]
    criterion: str | None
    p: float | None
    align: int
    schemes: tuple[int, ...]
    groups: tuple[int, ...] | str | None
    include: tuple[str, ...] | None
    exclude: tuple[str, ...] | None
    max_shard_bytes: int
    pivots: bool
    float32: bool  # spectra, where that can be checked
    pins: Mapping[str, Any] | None = None
    min_rank: int | None = None
    data: str | None = None  # a digest of the batches
    sensitivity: str | None = None
    refit: bool | None = None
    refine: int | None = None  # passes over the batches
    blocks: tuple[str, ...] | None = None  # the lists that hold them, where users say so
    hidden_units: bool | None = None

    @property
    def pinned(self) -> dict[str, Any]:
        """Options of a plan."""
        return {"pins": self.pins, "min_rank": self.min_rank or 1}

    @property
    def float32_first(self) -> bool:
        """Whether spectra are computed in float32 first."""
        return self.float32 and self.data is None and check_is_possible(list(self.budget), self.criterion, "alds")


@dataclass
class Work:
    """A checkpoint on its way: its layers, where their weights are stored, and what has been finished."""

    shards: Shards
    settings: Settings
    world: World
    device: torch.device
    journal: Journal
    progress: Progress
    model: nn.Module = field(init=False)
    layers: list[Layer] = field(init=False)
    sources: dict[str, str] = field(init=False)
    names: dict[str, str] = field(init=False)  # of all parameters, those that they are stored by
    pins: dict[str, Pin] = field(init=False)

    def __post_init__(self) -> None:
        self.model = skeleton(self.shards)
        names, assembled = stored_names(self.model, list(self.shards.tensors))
        check_stored(self.model, self.shards, names, assembled)
        untie(self.model, self.shards, names)
        self.names = dict(names)
        self._take_stored_types()
        self.sources = {name.removesuffix(".weight"): source for name, source in names.items()
                        if name.endswith(".weight") and source.endswith("weight")}  # fmt: skip
        layers = chosen_layers(self.model, self.settings.include, self.settings.exclude)
        self.layers = [self._check(layer) for layer in layers]
        self.pins = pins_of_layers(model=self.model, layers=self.layers, **self.settings.pinned)
        if self.world.first:
            self._check_biases()

    def _take_stored_types(self) -> None:
        """The parameters are of the types that they are stored in, by which a plan counts bytes."""
        for name, parameter in self.model.named_parameters():
            stored = self.shards.tensors.get(self.names.get(name, ""))
            if stored is not None and stored.dtype in DTYPES and DTYPES[stored.dtype].is_floating_point:
                parameter.data = parameter.data.to(DTYPES[stored.dtype])

    def _check_biases(self) -> None:
        """WeightError for NaN or infinite values of what is copied in one dimension, as biases and scales are."""
        places = ModuleNames(self.model)
        for name, stored in self.shards.tensors.items():
            place, _, kind = name.rpartition(".")
            if len(stored.shape) != 1 or places.match(self.settings.exclude or (), place):
                continue
            if bad := bad_values(stored.tensor(), infinite=True):
                raise WeightError(
                    f"{label(place)}: {bad} of {stored.shape[0]} values of its {kind} are NaN or infinite; mend them"
                )

    def _check(self, layer: Layer) -> Layer:
        """The layer, left out if its weight cannot be streamed; FileFormatError if its shape is another."""
        if not isinstance(layer, DecomposableLayer):
            return layer
        source = self.sources.get(layer.name)
        if source is None:
            return layer.left_out("its weight is not stored as a tensor of its own")
        groups, stored = self.settings.groups, self.shards.tensors[source]
        if stored.dtype not in DTYPES or not DTYPES[stored.dtype].is_floating_point:
            return layer.left_out(f"its weight is stored as {stored.dtype}")
        weight = layer.module.weight
        assert isinstance(weight, Tensor)
        layer.module.weight = nn.Parameter(weight.to(DTYPES[stored.dtype]), requires_grad=False)
        return layer if groups is None else with_groups(layer, groups)

    @property
    def ready(self) -> dict[int, DecomposableLayer]:
        """The layers that can be factorised, by number: their place among all, by which the journal knows them."""
        return {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, DecomposableLayer)}

    @contextmanager
    def weights(self, layers: Iterable[DecomposableLayer]) -> Iterator[dict[str, int]]:
        """The layers with their weights, checked, on the device, half types as float32; their CRC-32 by name."""
        layers, sums = list(layers), {}
        empty = [layer.module.weight for layer in layers]
        try:
            for layer in layers:
                tensor = self.shards.tensors[self.sources[layer.name]].tensor()
                sums[layer.name] = crc32(tensor)
                whole = tensor.dtype in (torch.float32, torch.float64)
                tensor = tensor.to(self.device, None if whole else torch.float32)
                layer.module.weight = nn.Parameter(tensor, requires_grad=False)
                check_weight(layer)
            yield sums
        finally:
            for layer, weight in zip(layers, empty, strict=True):
                layer.module.weight = weight

    def batches(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Layers by number, several at a time.

        They take no more memory than the largest layer, or than as many of median size as there are threads, if half
        of the free memory has room for those. (What comes out does not depend on it.)
        """
        ready = self.ready
        memory = {i: memory_of(layer.shape) for i, layer in ready.items()}
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        room = max(*memory.values(), min(for_threads(list(memory.values()), most=64), free // 2), 0)
        batch: list[int] = []
        for number in numbers:
            if batch and sum(memory[i] for i in (*batch, number)) > room:
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    def in_batches(self, what: str, numbers: list[int]) -> Iterator[list[int]]:
        """This process's part of the layers, a few at a time, and the progress told; then all processes meet."""
        share, ready = self.share(numbers), self.ready
        done, total = 0, sum(ready[i].shape.numel for i in share)
        for batch in self.batches(share):
            yield batch
            done += sum(ready[i].shape.numel for i in batch)
            self.progress(what, done, total)
        self.world.together()

    def share(self, numbers: list[int]) -> list[int]:
        """This process's part of the layers; all processes have looked what is left before one begins."""
        self.world.together()
        ready = self.ready
        return self.world.share(numbers, lambda i: cost_of(ready[i].shape))


def memory_of(shape: WeightShape) -> int:
    """Bytes of a layer that is worked on: weight, in float32 and as stored, fold, Gram matrices of all slice counts."""
    return 10 * shape.numel + 12 * shape.conv_groups * shape.smaller_side**2


def cost_of(shape: WeightShape) -> float:
    """What a layer costs, up to a factor: products with itself, the factors, the eigenproblems of all slice counts.

    (Their shares are those measured of float32 matrices from 1024 x 1024 to 16384 x 4096.)
    """
    filters, columns, order = shape.filters_per_group, shape.columns, shape.smaller_side
    slices = sum(k * min(filters, columns // k) ** 3 for k in auto_groups(shape.slice_channels))
    return float(order * shape.numel) + shape.conv_groups * (1.4 * order**3 + 0.75 * slices)
