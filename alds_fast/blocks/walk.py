"""Runs of a network that begin at the end of a block.

The model's own forward is called. In place of the blocks before that point stand functions that give back what the last
of them returned when it was run, and nothing but zeros for those before it. So whatever the model does before, between
and after its blocks (embeddings, masks, positions, heads, a loss) is done as ever, and only the blocks cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from ..measurement import Run, naming_batch
from .states import Room, blank, emptied, keep, restored

Forward = Callable[..., Any]


class Reached(BaseException):
    """Ends a forward pass; no Exception, which a model may catch."""


class LeftChain(BaseException):
    """A run did not come to a block that is to be run."""


@contextmanager
def forwards(model: nn.Module, new: Mapping[str, Callable[[Forward], Forward]]) -> Iterator[None]:
    """The named modules have other forwards, each made from its own; hooks are called as ever."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for name, make in new.items():
            module = model.get_submodule(name)
            before.append((module, vars(module).get("forward")))
            vars(module)["forward"] = make(module.forward)
        yield
    finally:
        for module, forward in reversed(before):
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward


class Walk:
    """A network that goes on from the end of a block, for batches by their numbers.

    ``position`` is the number of blocks that are not run: at first none. With ``returning`` what every block has
    returned is kept, so that the position may be set back; else only that of the last one.
    """

    def __init__(
        self, model: nn.Module, run: Run, blocks: Sequence[str], ends: Iterable[str] = (), *,
        room: Room | None = None, returning: bool = False,
    ) -> None:  # fmt: skip
        """``run``: how the model is run; ``ends``: blocks whose output is kept as long as the walk is."""
        self.model, self.blocks, self.ends, self.position = model, tuple(blocks), frozenset(ends), 0
        self._run, self._room, self._returning = run, room or Room(), returning
        self._outputs: dict[int, dict[str, Any]] = {}  # by batch, by block

    def run(self, batch: Any, number: int, name: str, seen: Callable[[str, Any], Any] = lambda block, y: y) -> Any:
        """The model's output; the blocks before ``position`` are not run. Arguments are those of ``run``.

        ``seen(block, output)`` is what the rest of the model gets of a block that is not run and whose output is kept.
        """
        known, last = self._outputs.get(number, {}), self.position - 1
        skipped = {}
        for i, block in enumerate(self.blocks[: self.position]):
            kept = i == last or block in self.ends
            skipped[block] = _giving(known[block] if kept else emptied(known[block]), block, seen if kept else None)
        with forwards(self.model, skipped):
            return self._run(batch, number, name)

    def advance(self, position: int, batches: Iterable[tuple[int, Any]], name: str) -> None:
        """Run the blocks up to there, for all numbered batches of ``name``, and keep what the last one returns."""
        if position <= self.position:
            return
        if not self._returning:
            self._room.begin()
        passed, last = self.blocks[self.position : position], self.blocks[position - 1]
        for number, batch in batches:
            kept = self._outputs.setdefault(number, {})
            new: dict[str, Any] = {}
            noted = {b: self._noting(b, b == last, new) for b in passed}
            with forwards(self.model, noted), naming_batch(number, name), suppress(Reached):
                self.run(batch, number, f"batch {number} of {name}")
            before = self.blocks[self.position - 1] if self.position else None
            if before is not None and before not in self.ends and not self._returning:
                kept[before] = emptied(kept[before])
            if last not in new:
                raise LeftChain(f"batch {number} does not come to block {last!r}")
            kept.update(new)
        self.position = position

    def output(self, number: int) -> Any:
        """What the block before ``position`` has returned on a batch."""
        return restored(self._outputs[number][self.blocks[self.position - 1]])

    def _noting(self, block: str, last: bool, new: dict[str, Any]) -> Callable[[Forward], Forward]:
        def make(own: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                output = own(*args, **kwargs)
                new[block] = keep(output, self._room) if last or block in self.ends else blank(output)
                if last:
                    raise Reached
                return output

            return forward

        return make


def _giving(output: Any, block: str, seen: Callable[[str, Any], Any] | None) -> Callable[[Forward], Forward]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return restored(output) if seen is None else seen(block, restored(output))

    return lambda own: forward
