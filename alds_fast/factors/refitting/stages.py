"""Which layers of a network are fitted together, from where on a pass of it runs, and up to where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...blocks import BlockChain, Reached, Room, Walk
from ...measurement import Run, first_input


class Network:
    """A network, how it is run, and how from the end of a block on."""

    def __init__(self, model: nn.Module, run: Run, chain: BlockChain, room: Room | None = None) -> None:
        self.model, self.walk = model, Walk(model, run, chain.blocks, chain.ends, room=room)


class Stage(NamedTuple):
    """Layers that are fitted together, with the number of their calls, and how many blocks are run before these."""

    calls: dict[str, int]
    position: int  # before the first call
    last: int  # before the last one


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Callable[..., None]], kind: str) -> Iterator[None]:
    """With hooks on layers, by name; of the ``kind`` forward_hook or forward_pre_hook."""
    with ExitStack() as stack:
        for name, hook in hooks.items():
            register = getattr(model.get_submodule(name), f"register_{kind}")
            stack.callback(register(hook, with_kwargs=True).remove)
        yield


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

    with hooked(net.model, {name: counting(hook) for name, hook in hooks.items()}, kind), suppress(Reached):
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
    last = {name: position for name, _, _, position in order}
    stages: list[tuple[list[str], int]] = []
    before: tuple[Tensor | None, int] = None, 0
    for name, x, version, position in order:
        if not calls[name] and x is before[0] and version == before[1]:
            stages[-1][0].append(name)
        elif not calls[name]:
            stages.append(([name], position))
        calls[name], before = calls[name] + 1, (x, version)
    return [
        Stage({name: calls[name] for name in names}, position, max(last[name] for name in names))
        for names, position in stages
    ]
