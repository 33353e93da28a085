"""The steps of ``Plan.apply`` that train a compressed model on data: refit and refinement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..criteria import CRITERIA, Basis
from ..factors import FactorReport, refine_blocks, refit, trained_reports
from ..layers import decomposable, find_layers
from ..measurement import first_batch
from ..progress import Progress


def inputs_of_run(
    model: nn.Module, example_inputs: Any, refit: Iterable[Any] | None, refine: Iterable[Any] | None
) -> tuple[Any, str]:
    """What the result is run with, None for nothing, and what errors call it."""
    for name, data in (("refit=", refit), ("refine=", refine)):
        if example_inputs is None and data is not None:
            return first_batch(model, data)[0], f"batch 1 of {name}"
    return example_inputs, "example_inputs"


def refine_steps(
    small: nn.Module, model: nn.Module, narrow: nn.Module, data: Iterable[Any], epochs: int, mask: str | None,
    reports: Mapping[str, FactorReport], tell: Progress, lists: Sequence[str] | None,
) -> dict[str, FactorReport]:  # fmt: skip
    """Train block after block of the compressed model, see :func:`alds_fast.refine`; reports of what became better.

    ``narrow`` is the dense model with the hidden units that the compressed one has.
    """
    blocks = refine_blocks(small, model, data, epochs=epochs, mask=mask, progress=tell, lists=lists)
    better = [block.block for block in blocks if block.after < block.before]
    return trained_reports(reports, small, narrow, "refined", better)


def refit_steps(
    small: nn.Module, model: nn.Module, narrow: nn.Module, names: Sequence[str], data: Iterable[Any],
    mask: str | None, basis: Basis, tell: Progress, lists: Sequence[str] | None, rows: Mapping[str, Tensor],
) -> dict[str, FactorReport]:  # fmt: skip
    """Fit layer after layer of these names, see :mod:`alds_fast.factors.refitting`; reports by name.

    ``narrow`` as for :func:`refine_steps`; ``rows``: which of the dense model's outputs its layers have.
    """
    gradients = {}
    for name, m in basis.moments.items():
        if CRITERIA[basis.criterion_of(name)].needs_gradients and m.gradient is not None:
            gradients[name] = m.gradient, m.gradient_noise
    layers = [layer for layer in decomposable(find_layers(narrow)) if layer.name in names]
    fitted: set[str] = set()

    def done(name: str, report: FactorReport | None) -> None:
        fitted.add(name)
        tell("refit", len(fitted), len(layers))

    return refit(
        small, model, layers, data, gradients=gradients, bias_correction=basis.bias_correction, mask=mask, done=done,
        lists=lists, rows=rows,
    )  # fmt: skip
