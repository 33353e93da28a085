"""A layer's row of a plan, from the candidate that was chosen."""

from __future__ import annotations

from typing import Any

from ..allocation import Candidates
from ..factors import Choice
from ..layers import Layer
from .plan_rows import LayerPlan, params_of


def planned_row(layer: Layer, pick: tuple[Candidates, int, str] | None, align: int, no_error: str | None) -> LayerPlan:
    """The row of a layer: left out without a ``pick`` (candidates, the one chosen, why it stays dense if it does).

    ``no_error`` says why it has no candidates, if the criterion is the reason.
    """
    groups = layer.shape.conv_groups if layer.shape else 1
    row: dict[str, Any] = {"name": layer.name, "kind": layer.kind, "shape": layer.weight, "conv_groups": groups}
    row |= {"scheme": None, "groups": None, "rank": None, "error": 0.0}
    row |= {"params_before": layer.params, "params_after": layer.params, "reason": layer.reason}
    if pick is None:
        return LayerPlan(**row)
    choices, candidate, reason = pick
    chosen = choices.choice(candidate)
    if chosen is None:
        multiples = f" with ranks that are multiples of {align}" if align > 1 else ""
        none = no_error or f"no factorisation{multiples} is smaller"
        return LayerPlan(**{**row, "reason": reason if choices.curves else none})
    scheme, groups, rank = chosen
    assert layer.shape is not None
    row |= {"scheme": scheme, "groups": groups, "rank": rank, "error": float(choices.errors[candidate])}
    row["params_after"] += params_of(Choice(layer.name, layer.shape, *chosen)) - layer.shape.numel
    return LayerPlan(**row)
