"""Which part of a chain of blocks a layer belongs to: what lies between the ends of two blocks is a part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...blocks import LeftChain
from ...layers import label
from ...processes import World


class Places:
    """The part that every layer belongs to, found as the parts are run: the number of the block at its end.

    A layer of a block belongs to that block's part, another one to the first part in which it is called. (It is called
    again in all later ones, since a run does anew what lies outside of blocks.) A layer that several blocks call, that
    is called by more parts than its own, or whose output several parts use, belongs to no one part: LeftChain.
    """

    def __init__(self, layers: Mapping[str, nn.Module], blocks: Sequence[str]) -> None:
        self.layers, self.blocks = layers, blocks
        self.part_of: dict[str, int] = {}
        self._inside = {name: self._block_of(name) for name in layers}
        self._calls: dict[str, int] = {}

    def _block_of(self, name: str) -> int | None:
        return next((i for i, b in enumerate(self.blocks) if name == b or name.startswith(f"{b}.")), None)

    def may_be(self, name: str, part: int) -> bool:
        """Whether a layer belongs to a part, or may do so, as it has been called in none yet."""
        inside = self._inside[name]
        return inside == part or (inside is None and self.part_of.get(name, part) == part)

    @contextmanager
    def noting(self, model: nn.Module, part: int) -> Iterator[None]:
        """Notes the calls while all batches are run through a part."""
        calls, running = Counter[str](), [False]

        def before(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                calls[name] += 1
                if self._inside[name] != (part if running[0] else None):
                    raise LeftChain(f"layer {label(name)} is called by more than one block")

            return hook

        with ExitStack() as stack:
            for name, module in self.layers.items():
                stack.callback(module.register_forward_pre_hook(before(name)).remove)
            if part < len(self.blocks):  # a run ends with its block
                block = model.get_submodule(self.blocks[part])
                for module, at_work in ((block, True), (model, False)):
                    note = module.register_forward_pre_hook(lambda *_, at_work=at_work: running.__setitem__(0, at_work))
                    stack.callback(note.remove)
            yield
        for name, count in calls.items():
            self.part_of.setdefault(name, part)
            if self._inside[name] is None and count != self._calls.setdefault(name, count):
                raise LeftChain(f"layer {label(name)} is called before and after the end of a block")

    def join(self, world: World) -> None:
        """All know where any has found a layer."""
        for found in world.tell(self.part_of):
            self.part_of = {**found, **self.part_of}

    @contextmanager
    def watching_gradients(self, part: int) -> Iterator[None]:
        """LeftChain where gradients of a part reach the output of a layer that belongs to one before."""
        reached: list[str] = []

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, y: Any) -> Any:
                if not isinstance(y, Tensor) or not torch.is_grad_enabled():
                    return None
                y = y if y.requires_grad else y.detach().requires_grad_().clone()
                y.register_hook(lambda g: reached.append(name))
                return y

            return hook

        with ExitStack() as stack:
            for name, module in self.layers.items():
                if self._inside[name] is None and self.part_of.get(name, part) < part:
                    stack.callback(module.register_forward_hook(watch(name)).remove)
            yield
        if reached:
            raise LeftChain(f"the output of layer {label(reached[0])} is used before and after the end of a block")
