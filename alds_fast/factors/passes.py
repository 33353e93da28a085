"""Passes of a network over the batches of refit=: which layers take one together, from where on, and up to where."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..blocks import BlockChain, Reached, Room, Walk, find_chain
from ..errors import ArgumentError
from ..measurement import Run, Samples, digest_of, first_input, numbered_batches

_LOG = logging.getLogger(__name__)


class Network:
    """A network, how it is run, and how from the end of a block on."""

    def __init__(self, model: nn.Module, run: Run, chain: BlockChain, room: Room | None = None) -> None:
        self.model, self.walk = model, Walk(model, run, chain.blocks, chain.ends, room=room)


class Stage(NamedTuple):
    """Layers that are fitted together, with the number of their calls, and the blocks that are run before them."""

    calls: dict[str, int]
    position: int


def run_until(
    net: Network, batch: Any, number: int, hooks: Mapping[str, Callable[..., None]], calls: int, kind: str
) -> None:
    """Run the model with hooks on layers, by name, until ``calls`` calls of them have been made."""
    remaining = calls

    def counting(hook: Callable[..., None]) -> Callable[..., None]:
        def count(*args: Any) -> None:
            nonlocal remaining
            hook(*args)
            remaining -= 1
            if remaining == 0:
                raise Reached

        return count

    with ExitStack() as stack:
        for name, hook in hooks.items():
            register = getattr(net.model.get_submodule(name), f"register_{kind}")
            stack.callback(register(counting(hook), with_kwargs=True).remove)
        with suppress(Reached):
            net.walk.run(batch, number, "a batch of refit=")


def find_stages(net: Network, batch: Any, names: Sequence[str], blocks: Sequence[str]) -> list[Stage]:
    """Layers in the order of their first calls, those that read one tensor together."""
    order: list[tuple[str, Tensor, int, int]] = []  # with the version: an input changed in place is another one
    done: list[nn.Module] = []

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_input(args, kwargs)
            order.append((name, x, 0 if x.is_inference() else x._version, len(done)))

        return note

    with ExitStack() as stack:
        for block in blocks:
            end = net.model.get_submodule(block).register_forward_hook(lambda module, args, y: done.append(module))
            stack.callback(end.remove)
        run_until(net, batch, 1, {name: hook(name) for name in names}, 0, "forward_pre_hook")
    calls = dict.fromkeys((name for name, *_ in order), 0)
    stages: list[Stage] = []
    before: tuple[Tensor | None, int] = None, 0
    for name, x, version, position in order:
        if not calls[name] and x is before[0] and version == before[1]:
            stages[-1].calls[name] = 0
        elif not calls[name]:
            stages.append(Stage({name: 0}, position))
        calls[name], before = calls[name] + 1, (x, version)
    return [Stage({name: calls[name] for name in stage.calls}, stage.position) for stage in stages]


def in_halves(data: Iterable[Any]) -> tuple[Any, Samples]:
    """The first batch, and which samples are which half; ArgumentError for no batches."""
    halves, first = Samples(1 / 2), None
    for batch in data:
        halves.aside(batch)
        first = batch if first is None else first
    if first is None:
        raise ArgumentError(
            "refit= has no batches, or had some once, and then none: each layer takes a pass; give a list of them"
        )
    return first, halves


def chain_of(model: nn.Module, run: Run, data: Iterable[Any]) -> BlockChain:
    """The model's blocks; none, as the log says, where it is no chain, or batches are others in every pass."""
    chain = find_chain(model, run, numbered_batches(data), "refit=")
    if chain.blocks and not isinstance(data, list | tuple):
        passes = [[digest_of(batch) for batch in data] for _ in range(2)]
        chain = chain if passes[0] == passes[1] else BlockChain(reason="a second pass gave other batches; pass a list")
    if not chain.blocks:
        return without_chain(chain.reason)
    _LOG.info("refit= goes on from %d blocks", len(chain.blocks))
    return chain


def without_chain(reason: str) -> BlockChain:
    """No blocks, as the log says."""
    _LOG.info("refit= goes on from 0 blocks (%s)", reason)
    return BlockChain(reason=reason)
