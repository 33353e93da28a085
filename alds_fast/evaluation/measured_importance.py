"""What each layer's error does to the whole model's output, measured: the model runs with one layer replaced at a time.

Errors by gradients are of first order, and take layers one by one; errors without gradients say nothing of what comes
after a layer. One run per layer says how far either is off. The idea is that of LEMS (ICML 2026), which scales curves
of sensitivity by one measurement each; here the curves stay exact and get a factor, ``plan(importance=)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..blocks import Walk, find_chain, forwards
from ..checks import check_model, is_number
from ..errors import ArgumentError, LayerNotFoundError, ModelError
from ..factors import names_logits, output_distance
from ..layers import opened_for
from ..measurement import (
    USUAL,
    Run,
    check_batches,
    masks_of,
    naming_batch,
    private_runs,
    without_fast_paths,
    without_labels,
)
from ..planning import Plan
from ..progress import ProgressOption, telling

_NAME = "measured_importance()"


@torch.no_grad()
def measured_importance(
    plan: Plan,
    small: nn.Module,
    model: nn.Module,
    data: Iterable[Any],
    *,
    kl: bool | None = None,
    mask: str | None = USUAL,
    limit: float = 4.0,
    progress: ProgressOption = None,
) -> dict[str, float]:
    """How much more each layer's error changes the output than the plan takes it to, for ``plan(importance=)``.

    Args:
        plan: has the layers' errors e.
        small: what it made of the model; its layers are tried one by one, all others being dense.
        model: the dense one; neither is changed.
        data: a list of batches as for :func:`alds_fast.analyze`, without labels. A few are enough: each is run once for
            every layer, where the model is a chain of blocks from the layer's block on.
        kl: compare outputs as logits, as for :func:`alds_fast.distill`.
        mask: as for analyze: what is padding does not count.
        limit: most that a factor may be, and its inverse the least, > 1.
        progress: as for analyze.

    Returns:
        By layer name, d / e over the median of all, d being the square root of the mean Kullback-Leibler divergence
        from the dense model, or the relative error of its output. Layers without an error are left out.

    Raises:
        ArgumentError, LayerNotFoundError, ModelError: an argument is out of range; a model without the plan's layers;
            one that raises an exception.
    """
    for net in (small, model):
        check_model(net)
    check_batches(data, "data")
    if not is_number(limit) or not 1.0 < limit < math.inf:
        raise ArgumentError(f"limit={limit!r} is outside (1, inf); 4 is usual")
    errors = {row.name: row.error for row in plan.layers if row.rank is not None and row.error > 0}
    model = opened_for(model, list(errors))
    made = {net: dict(net.named_modules(remove_duplicate=False)) for net in (small, model)}
    for name in errors:
        if any(name not in modules for modules in made.values()):
            raise LayerNotFoundError(f"layer {name!r} of the plan is not in both models; give the plan's own two")
    numbered = list(enumerate(without_labels(model, data), 1))
    if not numbered:
        raise ArgumentError("data has no batches: give a list of one or more")
    found: dict[str, float] = {}
    with telling(progress) as tell, private_runs(model) as run, without_fast_paths():
        work = _Runs(model, run, numbered, kl, mask)
        for name in work.in_order(errors):
            found[name] = math.sqrt(work.distance(name, made[small][name])) / errors[name]
            tell("layers measured", len(found), len(errors))
    middle = sorted(found.values())[len(found) // 2] if found else 1.0
    if not middle > 0:
        raise ModelError("most layers of the plan change nothing in the output on this data: it tells nothing of them")
    return {name: min(limit, max(1.0 / limit, value / middle)) for name, value in found.items()}


class _Runs:
    """The dense model with one layer replaced, from the block on that has it; its own outputs are kept."""

    def __init__(
        self, model: nn.Module, run: Run, numbered: list[tuple[int, Any]], kl: bool | None, mask: str | None
    ) -> None:
        chain = find_chain(model, run, numbered, _NAME)
        self.blocks, self.numbered, self.model = chain.blocks, numbered, model
        self.walk = Walk(model, run, chain.blocks, chain.ends)
        self.wanted = {number: self._run(batch, number) for number, batch in numbered}
        self.kl = names_logits(next(iter(self.wanted.values()))) if kl is None else kl
        self.masks = {number: masks_of(model, batch, mask) for number, batch in numbered}

    def _run(self, batch: Any, number: int) -> Any:
        with naming_batch(number, _NAME):
            return self.walk.run(batch, number, f"batch {number} of {_NAME}")

    def _block(self, name: str) -> int:
        """How many blocks there are before the layer, as far as that is known."""
        return next((i for i, block in enumerate(self.blocks) if name.startswith(f"{block}.")), 0)

    def in_order(self, names: Iterable[str]) -> list[str]:
        """By blocks, as they can only be gone through once."""
        return sorted(names, key=self._block)

    def distance(self, name: str, low: nn.Module) -> float:
        """Of the output with the layer ``low`` in the place of the named one, over all batches."""
        self.walk.advance(self._block(name), self.numbered, _NAME)
        lost = by = 0.0
        for number, batch in self.numbered:
            with forwards(self.model, {name: lambda own: low.forward}):
                output = self._run(batch, number)
            parts = output_distance(output, self.wanted[number], self.masks[number], self.kl, number, _NAME)
            lost, by = lost + float(parts[0]), by + parts[1]
        return max(0.0, lost) / by if by > 0 else 0.0
