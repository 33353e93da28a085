"""The steps of ``Plan.apply`` that train a compressed model on data: refit and refinement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..criteria import CRITERIA, Basis
from ..factors import FactorReport, refine_blocks, refit, trained_reports
from ..layers import decomposable, find_layers
from ..progress import Progress


def refine_steps(
    small: nn.Module, model: nn.Module, data: Iterable[Any], epochs: int, mask: str | None,
    reports: Mapping[str, FactorReport], tell: Progress, lists: Sequence[str] | None,
) -> dict[str, FactorReport]:  # fmt: skip
    """Train block after block of the compressed model, see :func:`alds_fast.refine`; reports of what became better."""
    blocks = refine_blocks(small, model, data, epochs=epochs, mask=mask, progress=tell, lists=lists)
    better = [block.block for block in blocks if block.after < block.before]
    return trained_reports(reports, small, model, "refined", better)


def refit_steps(
    small: nn.Module, model: nn.Module, names: Sequence[str], data: Iterable[Any], mask: str | None, basis: Basis,
    tell: Progress, lists: Sequence[str] | None,
) -> dict[str, FactorReport]:  # fmt: skip
    """Fit layer after layer of these names, see :mod:`alds_fast.factors.refitting`; reports by name."""
    gradients = {}
    for name, m in basis.moments.items():
        if CRITERIA[basis.criterion_of(name)].needs_gradients and m.gradient is not None:
            gradients[name] = m.gradient, m.gradient_noise
    layers = [layer for layer in decomposable(find_layers(model)) if layer.name in names]
    fitted: set[str] = set()

    def done(name: str, report: FactorReport | None) -> None:
        fitted.add(name)
        tell("refit", len(fitted), len(layers))

    return refit(
        small, model, layers, data, gradients=gradients, bias_correction=basis.bias_correction, mask=mask, done=done,
        lists=lists,
    )  # fmt: skip
