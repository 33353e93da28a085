"""Turn choices of (scheme, groups, rank) into a new model with low-rank layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..criteria import Weighting
from ..errors import LayerNotFoundError, PlanError
from ..layers import DecomposableLayer, LowRankLayer, check_weight, find_layers, label, replace_layers
from .choice import Choice, FactorReport
from .plain import low_rank_layer, plain_layers
from .weighted import factors as weighted_factors


def _resolve(model: nn.Module, choices: Sequence[Choice]) -> list[DecomposableLayer]:
    """The model's layers for the choices, checked."""
    layers = {layer.name: layer for layer in find_layers(model)}
    resolved = []
    for choice in choices:
        layer = layers.get(choice.name)
        if layer is None:
            raise LayerNotFoundError(f"the plan's layer {label(choice.name)} is not in the model")
        if not isinstance(layer, DecomposableLayer):
            raise PlanError(f"layer {label(choice.name)} cannot be replaced: {layer.reason}")
        if layer.shape != choice.shape:
            raise PlanError(
                f"layer {label(choice.name)}: the plan was made for {choice.shape}, the model has {layer.shape}; "
                f"analyse this model again"
            )
        resolved.append(layer)
    return resolved


def factorize(
    model: nn.Module,
    choices: Sequence[Choice],
    spectra: Mapping[str, Tensor] | None = None,
    *,
    exact: bool = False,
    constants: bool = False,
    weighted: Callable[[DecomposableLayer], Weighting | None] = lambda layer: None,
    done: Callable[[int], None] = lambda count: None,
) -> tuple[nn.Module, dict[str, FactorReport]]:
    """A new model with the chosen layers replaced by low-rank ones, and how their factors were computed.

    ``spectra[name]``, if given, holds the singular values (conv_groups, groups, r) of the layer's chosen slices; they
    serve as the certificate's optimum where their norms are those of the weight's slices, and are computed otherwise.
    ``exact`` asks for exact decompositions only. With ``constants`` convolutions without a weighting keep what they
    return for a constant input (:func:`alds_fast.factors.plain.keep_constants`). A layer for which ``weighted`` returns
    a weighting gets the factors that are best for it, and a bias that takes up the mean of the error. ``done`` is told
    how many layers have theirs. ``model`` is not changed. Raises
    LayerNotFoundError, PlanError or WeightError where a choice does not fit the model.
    """
    work = list(zip(choices, _resolve(model, choices), strict=True))
    for _, layer in work:
        check_weight(layer)
    new: dict[str, LowRankLayer] = {}
    reports: dict[str, FactorReport] = {}
    shifts: dict[str, Tensor] = {}
    plain = []
    for choice, layer in work:
        weights = weighted(layer)
        if weights is None:
            plain.append((choice, layer))
            continue
        new[choice.name], reports[choice.name], shifts[choice.name] = weighted_layer(layer, choice, weights)
        done(len(new))
    for choice, low, report in plain_layers(plain, spectra or {}, exact, constants=constants):
        new[choice.name], reports[choice.name] = low, report
        done(len(new))
    small = replace_layers(model, new)
    _shift_biases(new, shifts)
    return small, reports


def weighted_layer(
    layer: DecomposableLayer, choice: Choice, weights: Weighting
) -> tuple[LowRankLayer, FactorReport, Tensor]:
    """The low-rank layer that is best for a weighting, without its bias, and what that is to take up, (filters,)."""
    best = weighted_factors(weights, choice.decomposition)
    low = low_rank_layer(layer, choice, best.left, best.right)
    return low, FactorReport("weighted", 0, best.frobenius, best.error), best.shift


@torch.no_grad()
def _shift_biases(new: Mapping[str, LowRankLayer], shifts: Mapping[str, Tensor]) -> None:
    for name, shift in shifts.items():
        bias = new[name].bias
        if bias is not None and bool(shift.any()):
            bias.copy_(bias.double().cpu() + shift)
