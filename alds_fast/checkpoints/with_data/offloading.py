"""Models that lie on the CPU and run on another device: of their blocks one at a time is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...blocks import Forward, forwards
from ...layers import LowRankLayer


def is_offloaded(device: torch.device) -> bool:
    """Whether weights lie elsewhere than where they are computed with."""
    return device.type != "cpu"


def on_device(batches: Sequence[Any], device: torch.device) -> list[Any]:
    """Batches with their tensors there."""
    return [tree_map(lambda part: part.to(device) if isinstance(part, Tensor) else part, batch) for batch in batches]


def _weights(module: nn.Module) -> list[Tensor]:
    """What may be on the device for a while; buffers of other layers, which runs may change, are always there."""
    orders = [m.order for m in module.modules() if isinstance(m, LowRankLayer) and m.pivots]
    return [*module.parameters(), *orders]


class _Places:
    """Where weights are: their values on the CPU, and copies on the device of those that a run asks for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by weight, its values and their copy

    def _has_copy(self, weight: Tensor) -> bool:
        """Whether the weight's values are the copy: others may have been set since."""
        known = self._copies.get(id(weight))
        return known is not None and weight.data_ptr() == known[1].data_ptr()

    def bring(self, weights: Sequence[Tensor]) -> bool:
        """Have them on the device; whether they were not there."""
        with torch._C.DisableTorchFunction():  # it is no use of a weight that anybody watches for
            absent = [weight for weight in weights if not self._has_copy(weight)]
            for weight in absent:
                self._copies[id(weight)] = weight.data, weight.data.to(self.device, copy=True)
                weight.data = self._copies[id(weight)][1]
            return bool(absent)

    def put_back(self, weights: Sequence[Tensor]) -> None:
        """Have them on the CPU; what was set in the place of a copy stays."""
        with torch._C.DisableTorchFunction():
            for weight in weights:
                if self._has_copy(weight):
                    weight.data = self._copies[id(weight)][0]
                self._copies.pop(id(weight), None)


@contextmanager
def offloaded(
    model: nn.Module, blocks: Sequence[str], device: torch.device, brought: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """The model, which lies on the CPU, runs on the device.

    There are all buffers, what lies outside of the blocks, and of the blocks the one that was run last, until another
    one is run: a backward pass finds it. Parameters stay the objects that they are. ``brought`` is told when a block's
    weights have been copied.
    """
    places = _Places(device)
    inside = {block: _weights(model.get_submodule(block)) for block in blocks}
    moving = {id(weight) for weights in inside.values() for weight in weights}
    others = [weight for weight in _weights(model) if id(weight) not in moving]
    orders = set(map(id, _weights(model)))
    buffers = [(buffer, buffer.data) for buffer in model.buffers() if id(buffer) not in orders]
    there: list[str] = []

    def running(block: str) -> Callable[[Forward], Forward]:
        def make(own: Forward) -> Forward:
            @wraps(own)
            def forward(*args: Any, **kwargs: Any) -> Any:
                if there != [block]:
                    places.put_back([weight for name in there for weight in inside[name]])
                    there[:] = [block]
                if places.bring(inside[block]):
                    brought()
                return own(*args, **kwargs)

            return forward

        return make

    def all_else(own: Forward) -> Forward:
        @wraps(own)  # positional arguments are known by its signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            places.bring(others)  # layers outside of blocks may have been given other values
            return own(*args, **kwargs)

        return forward

    try:
        for buffer, values in buffers:
            buffer.data = values.to(device, copy=True)
        places.bring(others)
        with forwards(model, {"": all_else, **{block: running(block) for block in blocks}}):
            yield
    finally:
        places.put_back([*others, *(weight for weights in inside.values() for weight in weights)])
        for buffer, values in buffers:
            buffer.data = values
