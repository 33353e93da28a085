"""Layers that are compressed one after the other, each by what reaches it in the network compressed so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress

from torch import Tensor, nn

from alds_fast import AldsError
from alds_fast.blocks import Reached, Walk, find_chain
from alds_fast.measurement import private_runs

from .formulas import Factors
from .layers import before_calls, input_groups, wide_weight

Solve = Callable[[str, Tensor, Tensor, Tensor], Factors]
NAME = "calibration"


def compress_in_order(
    small: nn.Module, model: nn.Module, batches: Sequence[Tensor], names: Sequence[str], solve: Solve
) -> None:
    """Give the named low-rank layers of ``small``, in place, the factors that ``solve`` finds.

    Args:
        small: has low-rank layers of the final ranks; their factors count for nothing.
        model: the dense one, a chain of blocks.
        batches: of tokens.
        names: of the layers.
        solve: (name, W, E[x x'^T], E[x' x'^T]) to factors; x is the layer's input in the dense network, x' that in the
            network whose layers before are compressed, also those of the same block. All in float64.

    Layers that read one tensor are solved together. Raises AldsError for a model that is no chain of blocks.
    """
    numbered = list(enumerate(batches, 1))
    groups = input_groups(model, names, batches[0])
    with ExitStack() as stack:
        runs = [stack.enter_context(private_runs(net)) for net in (model, small)]
        chain = find_chain(model, runs[0], numbered[:1], NAME)
        if not chain.blocks:
            raise AldsError(f"layers are compressed in order along a chain of blocks: {chain.reason}")
        dense, low = (Walk(net, run, chain.blocks, chain.ends) for net, run in zip((model, small), runs, strict=True))
        for position, block in enumerate(chain.blocks, 1):
            here = [group for group in groups if group[0].startswith(f"{block}.")]
            inputs: dict[str, list[Tensor]] = {group[0]: [] for group in here}
            with before_calls(model, list(inputs), lambda name, x, into=inputs: into[name].append(x.clone())):
                dense.advance(position, numbered, NAME)
            for group in here:
                moments = _moments(inputs.pop(group[0]), _reaching(low, group[0], numbered))
                for name in group:
                    left, right = solve(name, wide_weight(model.get_submodule(name)), *moments)
                    small.get_submodule(name).update_factors(left[None, None], right[None, None])
            low.advance(position, numbered, NAME)


def _reaching(walk: Walk, name: str, numbered: Sequence[tuple[int, Tensor]]) -> Iterator[Tensor]:
    """What the layer is called with, batch after batch; the model does not run on behind it."""
    seen: list[Tensor] = []

    def told(_: str, x: Tensor) -> None:
        seen.append(x)
        raise Reached

    for number, batch in numbered:
        with before_calls(walk.model, [name], told), suppress(Reached):
            walk.run(batch, number, NAME)
        yield seen.pop()


def _moments(dense: Sequence[Tensor], compressed: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """E[x x'^T] and E[x' x'^T] over the batches."""
    cross: Tensor | int = 0
    second: Tensor | int = 0
    rows = 0
    for x, y in zip(dense, compressed, strict=True):
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        cross, second, rows = cross + (x.T @ y).double(), second + (y.T @ y).double(), rows + len(x)
    return cross / rows, second / rows
