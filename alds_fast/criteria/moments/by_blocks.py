"""Moments collected block after block: what is in memory at a time are the sums of one block's layers.

All batches go through the first block, then through the second, and so on; then gradients take the way back. Every
block is run once forward and, where gradients are asked for, once more with its graph. Sums are those of
:func:`alds_fast.criteria.collect_moments`. Of several processes each takes some of the batches; the first one has the
sums of all at the end of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from ...blocks import BackwardWalk, BlockChain, Room, Walk
from ...layers import DecomposableLayer
from ...measurement import USUAL, Samples, Sensitivity, backward_from, masks_of, naming_batch, private_runs, signs_of
from ...processes import World
from .by_processes import Beginnings, add_up, begin_as, beginnings
from .collection import (
    check_gradients_are_possible,
    check_moment,
    frozen,
    gradient_over,
    moments_of,
    refuse_unreached,
    warn_of_masks,
)
from .hooks import Collector, moment_forms
from .parts import Places

INPUTS, GRADIENTS = "inputs", "gradients"
_NAME = "data="


class Known(Protocol):
    """Where results are kept, part after part: a part is what lies between the ends of two blocks, by its number."""

    def has(self, kind: str, part: int) -> bool:
        """Whether a part's results are there: ``INPUTS``, moments without gradients, or gradients."""

    def keep(self, kind: str, part: int, results: Mapping[str, Any]) -> None:
        """Keep them, by layer name: :class:`alds_fast.criteria.Moments`, or a gradients' moment and its noise."""


class _Batches(NamedTuple):
    """This process's numbered batches, and what of each is kept aside."""

    model: nn.Module
    numbered: Sequence[tuple[int, Any]]
    aside: Sequence[Tensor]
    mask: str | None
    world: World

    def told(self, collector: Collector) -> Iterator[tuple[int, Any]]:
        """One after the other; the collector knows which it sees, and in the end the first one what all have seen.

        All begin with what the first process has seen of the first batch.
        """
        begun = None if self.world.first else self._begin(collector)
        for (number, batch), aside in zip(self.numbered, self.aside, strict=True):
            collector.begin(number, masks_of(self.model, batch, self.mask), aside)
            yield number, batch
            begun = self._begin(collector) if begun is None else begun
        if self.world.size > 1 and begun is not None:
            add_up(collector, begun, self.world)

    def _begin(self, collector: Collector) -> Beginnings:
        """What the first process has begun with, in all of them."""
        if self.world.size == 1:
            return {}
        begun = self.world.told_by(0, beginnings(collector) if self.world.first else None)
        if not self.world.first:
            begin_as(collector, begun)
        return begun


def collect_by_blocks(
    model: nn.Module,
    data: Sequence[Any],
    layers: Sequence[DecomposableLayer],
    chain: BlockChain,
    known: Known,
    *,
    sensitivity: Sensitivity = False,
    mask: str | None = USUAL,
    order: int = 8192,
    held_out: float = 0.0,
    room: Callable[[], Room] = Room,
    done: Callable[[int, int], None] = lambda part, parts: None,
    world: World | None = None,
) -> None:
    """Moments of the layers over all batches, given to ``known`` part after part; parts that it has are not summed up.

    Args:
        model: a chain of blocks; it is left as it was.
        data: batches as for :func:`alds_fast.criteria.collect_moments`, as are sensitivity, mask, order, held_out.
        layers: whose moments are collected; those that are never called are in no part.
        chain: from :func:`alds_fast.blocks.find_chain`.
        known: where the results go.
        room: makes what keeps the blocks' outputs, once for these and once for gradients.
        done: told the number of finished parts, and of all, after each.
        world: the processes that share the batches, by their numbers, of which each needs one at least. All must pass
            the same arguments. Only the first gives results to ``known``, which all read. Only Linear layers: how many
            patches of a convolution are drawn depends on the batches before.

    Raises:
        ArgumentError, ModelError: as collect_moments; or batch 1 does not reach a layer that batches of other processes
            do.
        LeftChain: a batch does not come to a block, or a layer belongs to no one part (:class:`Places`).
    """
    forms = moment_forms(layers, order, bool(sensitivity), None)
    layers = [layer for layer in layers if layer.name in forms]
    if sensitivity:
        check_gradients_are_possible(model)
    samples, world = Samples(held_out), world or World()
    numbered = [(number, batch, samples.aside(batch)) for number, batch in enumerate(data, 1)]
    own = [(number, batch, aside) for number, batch, aside in numbered if world.takes(number)]
    batches = _Batches(model, [batch[:2] for batch in own], [aside for *_, aside in own], mask, world)
    parts = (len(chain.blocks) + 1) * (2 if sensitivity else 1)
    if all(known.has(kind, i) for kind in _kinds(sensitivity) for i in range(len(chain.blocks) + 1)):
        return
    with private_runs(model) as run, frozen(model):
        walk = Walk(model, run, chain.blocks, chain.ends, room=room(), returning=bool(sensitivity))
        passes = _Passes(walk, batches, layers, forms, known, samples.worth, lambda part: done(part, parts))
        passes.forward(tail=not sensitivity)
        if sensitivity:
            passes.backward(BackwardWalk(walk, room()), sensitivity)


def _kinds(sensitivity: Sensitivity) -> Iterable[str]:
    return (INPUTS, GRADIENTS) if sensitivity else (INPUTS,)


class _Passes:
    """The way through the blocks, and back."""

    def __init__(
        self, walk: Walk, batches: _Batches, layers: Sequence[DecomposableLayer], forms: Mapping[str, Any],
        known: Known, worth: float, done: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.walk, self.batches, self.layers, self.forms = walk, batches, layers, forms
        self.known, self.worth, self.done = known, worth, done
        self.tokens = self.masked = self.reached = False
        self.places = Places({layer.name: layer.module for layer in layers}, walk.blocks)
        self.wanted: list[str] = []  # kinds of results that the part at work is to give

    def _collector(self, kinds: Iterable[str], part: int) -> Collector:
        """Of the layers that may belong to the part; of none where it is known."""
        self.wanted = [kind for kind in kinds if not self.known.has(kind, part)]
        layers = [layer for layer in self.layers if self.wanted and self.places.may_be(layer.name, part)]
        return Collector(layers, self.forms, GRADIENTS in kinds)

    def forward(self, tail: bool) -> None:
        """Inputs of all parts; of what comes after the last block only with ``tail``."""
        walk, count = self.walk, len(self.walk.blocks)
        for part in range(count + tail):
            collector = self._collector([INPUTS], part)
            with collector.hooks(), self.places.noting(walk.model, part):
                if part < count:
                    walk.advance(part + 1, self.batches.told(collector), _NAME)
                else:
                    for number, batch in self.batches.told(collector):
                        with naming_batch(number, _NAME):
                            walk.run(batch, number, f"batch {number} of {_NAME}")
            self.places.join(self.batches.world)
            self._keep_inputs(collector, part)
            self.done(part + 1)
        if tail:
            self._check_reached()

    def backward(self, back: BackwardWalk, sensitivity: Sensitivity) -> None:
        """Gradients of all parts, from the output on; and inputs of what comes after the last block."""
        count, energy = len(self.walk.blocks), 0.0
        for part in reversed(range(count + 1)):
            kinds = [INPUTS, GRADIENTS] if part == count else [GRADIENTS]
            collector = self._collector(kinds, part)
            collector.back = part < count

            def begin(output: Any, number: int, batch: Any, collector: Collector = collector) -> None:
                collector.back = True
                collector.energy += backward_from(output, batch, sensitivity, signs_of(number))
                collector.back = False

            noting = self.places.noting(self.walk.model, part) if part == count else nullcontext()
            with collector.hooks(), noting, self.places.watching_gradients(part):
                back.step(self.batches.told(collector), _NAME, begin)
            if part == count:
                self.places.join(self.batches.world)
                energy = collector.energy
                self._keep_inputs(collector, part)
                self._check_reached()
            self._keep_gradients(collector, part, energy)
            self.done(2 * (count + 1) - part)

    def _keep_inputs(self, collector: Collector, part: int) -> None:
        self.tokens, self.masked = self.tokens or collector.tokens, self.masked or collector.masked
        self.reached = self.reached or part in self.places.part_of.values()
        if INPUTS in self.wanted and self.batches.world.first:
            collector.gradients = False
            self.known.keep(INPUTS, part, moments_of(collector, self.worth))

    def _keep_gradients(self, collector: Collector, part: int, energy: float) -> None:
        if GRADIENTS not in self.wanted or not self.batches.world.first:
            return
        results = {}
        for layer in collector.layers:
            sums = collector.gradient_sums[layer.name]
            if sums.rows and energy > 0:
                results[layer.name] = gradient_over(sums, energy, self.worth)
                check_moment(layer, None, results[layer.name][0])
        self.known.keep(GRADIENTS, part, results)

    def _check_reached(self) -> None:
        model, numbered, _, mask, _ = self.batches
        if self.tokens and not self.masked and any(masks_of(model, batch, mask) for _, batch in numbered):
            warn_of_masks()
        if self.layers and not self.reached:
            refuse_unreached()
