"""Whether a model's blocks are a chain: a run that begins at the end of any of them gives what a whole run gives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ArgumentError
from ..measurement import Run, leaves_of, naming_batch
from .discovery import find_blocks
from .walk import Forward, LeftChain, Walk, forwards

LEAST = 3  # blocks, below which nothing is gained
SAME_OUTPUT = 1e-4  # of the norm: what rounding may change
_MOST = 4096  # numbers of a tensor that are compared
_PLAIN = Tensor, type(None), bool, int, float, str
Sketch = list[tuple[torch.Size, Tensor]]


class BlockChain(NamedTuple):
    """Blocks in the order in which they are run; none, and the reason, where a model has no chain.

    ``ends``: the last blocks of lists before others, whose outputs all later blocks may read (encoders of decoders).
    """

    blocks: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    reason: str = ""


def _sketch(value: Any) -> Sketch:
    """Shapes of the tensors in an output, and some of their numbers."""
    tensors = [t.detach() for t in tree_leaves(value) if isinstance(t, Tensor)]
    return [(t.shape, t.reshape(-1)[:: _step(t.shape)].to("cpu", torch.float64)) for t in tensors]


def _step(shape: torch.Size) -> int:
    """How far apart the numbers of a tensor are that are compared: they fall on all places of all dimensions."""
    step = max(1, math.prod(shape) // _MOST)
    while any(math.gcd(step, size) > 1 for size in shape):
        step += 1
    return step


def _same(a: Sketch, b: Sketch) -> bool:
    def near(x: Tensor, y: Tensor) -> bool:
        x, y = x.nan_to_num(), y.nan_to_num()
        return float((x - y).norm()) <= SAME_OUTPUT * float(x.norm())

    return len(a) == len(b) and all(m == n and near(x, y) for (m, x), (n, y) in zip(a, b, strict=True))


class _Record:
    """Which blocks a run calls, in what order, and what they return."""

    def __init__(self) -> None:
        self.events: list[tuple[str, bool]] = []  # with whether it is the end of the call
        self.outputs: dict[str, Sketch] = {}
        self.odd: str | None = None  # a block that returns something else than tensors and plain values

    def noting(self, block: str) -> Callable[[Forward], Forward]:
        """A forward of the block that is its own, and is noted."""

        def make(own: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                self.events.append((block, False))
                output = own(*args, **kwargs)
                self.events.append((block, True))
                self.outputs[block] = _sketch(output)
                self.odd = self.odd or next((block for p in tree_leaves(output) if not isinstance(p, _PLAIN)), None)
                return output

            return forward

        return make

    def order(self) -> tuple[str, ...]:
        """Blocks that are called once, in order; none if one is called inside of another."""
        begun = [block for block, end in self.events if not end]
        once = [block for block in begun if begun.count(block) == 1]
        events = [event for event in self.events if event[0] in once]
        return tuple(once) if events == [(block, end) for block in once for end in (False, True)] else ()


def _ends(model: nn.Module, blocks: tuple[str, ...]) -> tuple[str, ...]:
    """The last blocks of every ModuleList but that of the last one."""
    last = {block.rpartition(".")[0]: block for block in blocks}
    return tuple(
        block for of, block in last.items()
        if block != blocks[-1] and isinstance(model.get_submodule(of), nn.ModuleList)
    )  # fmt: skip


def kinds_of(numbered: Iterable[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """The first two batches of every kind: of tensors of as many dimensions and the same types, and equal otherwise."""
    kinds: dict[str, list[tuple[int, Any]]] = {}
    for number, batch in numbered:
        looks = [(t.dim(), t.dtype) if isinstance(t, Tensor) else repr(t) for t in leaves_of(batch)]
        alike = kinds.setdefault(f"{[*batch] if isinstance(batch, Mapping) else ''} {looks}", [])
        if len(alike) < 2:
            alike.append((number, batch))
    return sorted(itertools.chain(*kinds.values()), key=lambda numbered: numbered[0])


def find_chain(
    model: nn.Module, run: Run, batches: Iterable[tuple[int, Any]], name: str, lists: Sequence[str] | None = None
) -> BlockChain:
    """The model's chain of blocks, tried on all batches: every block must return what it returns in a whole run.

    Args:
        model: the model.
        run: how it is run, see :func:`alds_fast.measurement.private_runs`.
        batches: with their numbers. It is run with each as a whole and block by block.
        name: what errors call the data.
        lists: where the blocks are, if users say so; ArgumentError if these are no chain.
    """
    chain = _tried_chain(model, run, batches, name, find_blocks(model, lists))
    if lists is not None and not chain.blocks:
        raise ArgumentError(f"blocks={','.join(lists)!r} are no chain: {chain.reason}; leave out blocks=")
    return chain


def _tried_chain(
    model: nn.Module, run: Run, batches: Iterable[tuple[int, Any]], name: str, likely: list[str]
) -> BlockChain:
    if len(likely) < LEAST:
        return BlockChain(reason=f"the model has {len(likely)} modules that look like blocks, and {LEAST} are needed")
    chain: BlockChain | None = None
    for number, batch in batches:
        found = _chain_of(model, run, likely, number, batch, name)
        if not found.blocks:
            return found
        if chain is not None and found != chain:
            return BlockChain(reason=f"batch {number} runs other blocks, or in another order, than those before it")
        chain = found
    return chain or BlockChain(reason="there are no batches")


def _chain_of(model: nn.Module, run: Run, likely: list[str], number: int, batch: Any, name: str) -> BlockChain:
    record = _Record()
    with forwards(model, {block: record.noting(block) for block in likely}), naming_batch(number, name):
        output = _sketch(run(batch, number, f"batch {number} of {name}"))
    blocks = record.order()
    if len(blocks) < LEAST:
        return BlockChain(reason=f"of {len(likely)} blocks {len(blocks)} are called once and one after another")
    if record.odd is not None:
        return BlockChain(reason=f"block {record.odd} returns more than tensors")
    ends = _ends(model, blocks)
    walk = Walk(model, run, blocks, ends)
    for position, block in enumerate(blocks, 1):
        try:
            walk.advance(position, [(number, batch)], name)
            same = _same(record.outputs[block], _sketch(walk.output(number)))
        except (Exception, LeftChain) as e:  # whatever the model says to zeros
            return BlockChain(reason=f"block {block} does not run on what the block before it returned: {e}")
        if not same:
            return BlockChain(reason=f"block {block} depends on more than what the block before it returned")
    try:
        same = _same(output, _sketch(walk.run(batch, number, name)))
    except Exception as e:  # it reads what a block would have left behind
        return BlockChain(reason=f"the model does not run without its blocks: {type(e).__name__}: {e}")
    if not same:
        return BlockChain(reason="the model's output depends on more than what its last block returned")
    return BlockChain(blocks, ends)
