"""Layers without the hidden units that a plan removes; the consumer's weight takes up what the others tell of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...criteria import HiddenUnits, Moments, Weighting, compensated
from ...errors import PlanError
from ...layers import (
    DecomposableLayer,
    Layer,
    find_layers,
    is_plain_linear,
    label,
    narrow_layer,
    oriented_weight,
    replace_layers,
)


@dataclass(frozen=True)
class FewerUnits(HiddenUnits):
    """Of ``count`` hidden units between producers and consumer those that are ``kept``, ascending.

    ``error`` is that of the consumer without the others, relative as the plan's errors of ranks are.
    """

    kept: tuple[int, ...] = field(repr=False)
    error: float

    @property
    def text(self) -> str:
        """In words how many are left."""
        return f"{len(self.kept)} of {self.count} hidden units"

    def sizes(self, layers: Mapping[str, Layer]) -> dict[str, dict[str, list[int]]]:
        """By layer what is left and what was there, as :func:`alds_fast.layers.narrowed_sizes` has it."""
        sizes, kept = {}, len(self.kept)
        for name in self.layers:
            outputs, inputs = layers[name].weight
            shape = [outputs, kept] if name == self.consumer else [kept, inputs]
            sizes[name] = {"shape": shape, "dense_shape": [outputs, inputs]}
        return sizes

    @property
    def index(self) -> Tensor:
        """The units kept, int64, on the CPU."""
        return torch.tensor(self.kept, dtype=torch.int64, device="cpu")


def rows_kept(fewer: Iterable[FewerUnits]) -> dict[str, Tensor]:
    """By name of a producer, which of its outputs stay."""
    return {name: units.index for units in fewer for name in units.producers}


def narrow_model(
    model: nn.Module, fewer: Sequence[FewerUnits], weighted: Callable[[DecomposableLayer], Weighting | None]
) -> nn.Module:
    """A copy of the model with narrower layers that shares all other tensors with it; itself where none is narrower.

    ``weighted`` gives what a consumer's errors are weighted by. PlanError where the model has no such layers, or
    nothing is known of what a consumer sees.
    """
    if not fewer:
        return model
    layers, new = {layer.name: layer for layer in find_layers(model)}, dict[str, nn.Module]()
    for units in fewer:
        new |= narrow_layers(layers, units, weighted)
    return replace_layers(model, new, share=True)


@torch.no_grad()
def narrow_layers(
    layers: Mapping[str, Layer], units: FewerUnits, weighted: Callable[[DecomposableLayer], Weighting | None]
) -> dict[str, nn.Module]:
    """The narrower layers of one group, by name; as :func:`narrow_model`."""
    for name in units.layers:
        _check(layers.get(name), name, units)
    kept, new = units.index, dict[str, nn.Module]()
    for name in units.producers:
        module: Any = layers[name].module
        at = kept.to(module.weight.device)
        bias = None if module.bias is None else module.bias.detach()[at]
        new[name] = narrow_layer(module, oriented_weight(module)[at], bias)
    layer = layers[units.consumer]
    assert isinstance(layer, DecomposableLayer)
    weights = weighted(layer)
    if weights is None or weights.second is None:
        raise PlanError(
            f"layer {label(layer.name)}: the plan keeps {units.text}, for which moments of its input are needed; "
            f"pass plan.apply(model, moments=analysis.moments) of analyze(model, data=...)"
        )
    new[layer.name] = _consumer(layer.module, weights, kept)
    return new


def _check(layer: Any, name: str, units: FewerUnits) -> None:
    if not isinstance(layer, DecomposableLayer) or not is_plain_linear(layer.module):
        why = layer.reason if layer is not None and layer.reason else "the model has no such linear layer"
        raise PlanError(f"layer {label(name)}: the plan keeps {units.text} and cannot here: {why}")
    own = layer.weight[1 if name == units.consumer else 0]
    if own != units.count:
        raise PlanError(f"layer {label(name)}: the plan is for {units.count} hidden units, the model has {own}")


def _consumer(module: Any, weights: Weighting, kept: Tensor) -> nn.Module:
    fitted = compensated(weights, kept)
    bias = None
    if module.bias is not None:
        bias = (module.bias.detach().double().cpu() + fitted.shift).to(module.bias)
    return narrow_layer(module, fitted.weight.to(module.weight), bias)


class NarrowMoments(Mapping[str, Moments]):
    """What the layers of the narrower model see: parts of what those of the model see, taken when asked for."""

    def __init__(self, moments: Mapping[str, Moments], fewer: Iterable[FewerUnits]) -> None:
        self.moments, self.parts = moments, dict[str, tuple[Callable[[Moments, Tensor], Moments], Tensor]]()
        for units in fewer:
            kept = units.index
            self.parts |= dict.fromkeys(units.producers, (_of_producer, kept))
            self.parts[units.consumer] = _of_consumer, kept

    def __getitem__(self, name: str) -> Moments:
        whole = self.moments[name]
        if name not in self.parts:
            return whole
        part, kept = self.parts[name]
        return part(whole, kept)

    def __iter__(self) -> Iterator[str]:
        return iter(self.moments)

    def __len__(self) -> int:
        return len(self.moments)


def _of_producer(m: Moments, kept: Tensor) -> Moments:
    gradient = _part(m.gradient, kept)
    new = replace(m, gradient=gradient, gradient_noise=m.gradient_noise * _share(gradient, m.gradient) ** 2)
    if m.second is not None:
        return new
    held, (noise, mean_noise) = None if m.held is None else m.held[..., kept], _noise(m, m.output, kept)
    return replace(
        new, mean=m.mean[..., kept], output=_part(m.output, kept), held=held, noise=noise, mean_noise=mean_noise
    )


def _of_consumer(m: Moments, kept: Tensor) -> Moments:
    held, (noise, mean_noise) = None if m.held is None else m.held[..., kept], _noise(m, m.second, kept)
    return replace(
        m, second=_part(m.second, kept), mean=m.mean[..., kept], held=held, noise=noise, mean_noise=mean_noise
    )


def _noise(m: Moments, whole: Tensor | None, kept: Tensor) -> tuple[float, float]:
    """Noise and mean_noise of a part: squared distances grow with the square of what is measured, of means with it."""
    share = _share(_part(whole, kept), whole)
    return m.noise * share**2, m.mean_noise * share


def _part(matrix: Tensor | None, kept: Tensor) -> Tensor | None:
    """Of (g0, n, n) or a diagonal (g0, n)."""
    if matrix is None:
        return None
    return matrix[:, kept] if matrix.dim() == 2 else matrix[:, kept][:, :, kept]


def _share(part: Tensor | None, whole: Tensor | None) -> float:
    """Of the trace."""
    if part is None or whole is None:
        return 1.0
    traces = [float((x if x.dim() == 2 else x.diagonal(dim1=-2, dim2=-1)).sum()) for x in (part, whole)]
    return traces[0] / traces[1] if traces[1] > 0 else 1.0
