"""Find the layers of a model that can be factorised, and say why the others are left out."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from ..checks import check_model
from ..errors import ArgumentError, LayerNotFoundError, WeightError
from ..linalg import WeightShape
from .registry import LOW_RANK, is_transposed, oriented_weight, weight_shape
from .shared_weights import tied_names

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Layer:
    """A module with a weight of two or more dimensions, under its first name in the model.

    ``shape`` is None unless it is a Linear (transformers' Conv1D too) or Conv1d/2d/3d; ``reason`` says in words why it
    is left out, None for a :class:`DecomposableLayer`; ``params`` counts its own parameters (weight and bias);
    ``own_bias`` is true for a bias that it shares with no other module.
    """

    name: str
    kind: str
    weight: tuple[int, ...]
    shape: WeightShape | None
    params: int
    reason: str | None
    module: nn.Module = field(repr=False, compare=False)
    own_bias: bool = False

    def left_out(self, reason: str) -> Layer:
        """The layer, left out for that reason."""
        return Layer(**{**vars(self), "reason": reason})


@dataclass(frozen=True)
class DecomposableLayer(Layer):
    """A layer that a low-rank one can take the place of: its shape is known and its ``reason`` is None."""

    shape: WeightShape


def decomposable(layers: Iterable[Layer]) -> list[DecomposableLayer]:
    """Those of the layers that are not left out.

    >>> [layer.name for layer in decomposable(find_layers(nn.Sequential(nn.Linear(4, 2), nn.Embedding(5, 2))))]
    ['0']
    """
    return [layer for layer in layers if isinstance(layer, DecomposableLayer)]


def count_params(model: nn.Module) -> int:
    """Number of parameters of the model, shared ones once, those not initialised yet not at all."""
    return sum(p.numel() for p in model.parameters() if not isinstance(p, UninitializedParameter))


def label(name: str) -> str:
    """How a layer is called in messages; the model itself has the empty name."""
    return repr(name) if name else "the model itself"


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks of any kind, which a replacement would drop."""
    return any(name.endswith("hooks") and len(value) for name, value in vars(module).items() if isinstance(value, dict))


def _structural_reason(module: nn.Module, parent: nn.Module | None) -> str | None:
    """Why this module cannot be replaced whatever its values are."""
    if not isinstance(module, tuple(LOW_RANK)) and not is_transposed(module):
        return f"{type(module).__name__} is not decomposed (Linear, Conv1d, Conv2d and Conv3d are)"
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads this weight directly"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized; remove the parametrization first"
    if isinstance(module.weight, UninitializedParameter):
        return "its weight is not initialised yet; run one forward pass first"
    if type(module) not in LOW_RANK and not is_transposed(module):
        return f"{type(module).__name__} is a subclass with a forward of its own"
    if "forward" in vars(module):
        return "it has a forward of its own set on the instance"
    if has_hooks(module):
        return "it has hooks, which a replacement would drop; remove them first"
    if module._buffers or module._modules or set(module._parameters) != {"weight", "bias"}:
        return "it has parameters, buffers or modules beside weight and bias"
    if not isinstance(module.weight, Tensor) or module.weight.dtype not in _TYPES:
        return f"its weight is {getattr(module.weight, 'dtype', type(module.weight).__name__)}, not real floating point"
    if module.weight.layout != torch.strided:
        return f"its weight is not dense but {module.weight.layout}"
    shape = weight_shape(module)
    if shape is not None and tuple(oriented_weight(module).shape) != shape.weight:
        return f"its weight has shape {tuple(oriented_weight(module).shape)}, not the {shape.weight} of its settings"
    if module.weight.numel() == 0:
        return "its weight is empty"
    return None


def patterns(value: str | Iterable[str] | None, argument: str) -> tuple[str, ...] | None:
    """Name patterns as a tuple, None for none given; ArgumentError for anything else."""
    if value is None:
        return None
    several = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (0,)
    if not all(isinstance(p, str) for p in several):
        raise ArgumentError(f"{argument}={value!r}: expected a name pattern or several")
    return several


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) for p in patterns)


def _check_patterns(patterns: Iterable[str], names: Sequence[str], argument: str) -> None:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(n, pattern) for n in names):
            close = difflib.get_close_matches(pattern, names, n=3) or list(names[:3])
            raise LayerNotFoundError(f"{argument}={pattern!r} matches no layer; layers are, for example, {close}")


def _weight_of(module: nn.Module) -> Tensor | None:
    weights = [p for p in module._parameters.values() if p is not None]
    weights = [p for p in weights if isinstance(p, UninitializedParameter) or p.dim() >= 2]
    if parametrize.is_parametrized(module):
        return next(iter(module.parameters()))
    return weights[0] if weights else None


def find_layers(
    model: nn.Module, include: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = None
) -> list[Layer]:
    """Every module with a weight of two or more dimensions, in the model's order, with the reason if it is left out.

    ``include`` and ``exclude`` are shell-style name patterns (``"encoder.*"``). Raises ModelError if ``model`` is not
    an ``nn.Module`` and LayerNotFoundError for a pattern that matches nothing.
    """
    check_model(model)
    wanted, unwanted = patterns(include, "include") or (), patterns(exclude, "exclude") or ()
    parents = {id(child): module for module in model.modules() for child in module.children()}
    weighted = [
        (n, m, w)
        for n, m in model.named_modules()
        if (w := _weight_of(m)) is not None and "parametrizations" not in n.split(".")
    ]
    names = [n for n, _, _ in weighted]
    _check_patterns(wanted, names, "include")
    _check_patterns(unwanted, names, "exclude")
    tied = tied_names(model)

    def reason(name: str, module: nn.Module, weight: Tensor) -> str | None:
        structural = _structural_reason(module, parents.get(id(module)))
        if structural:
            return structural
        if include is not None and not _matches(name, wanted):
            return "not matched by include="
        if _matches(name, unwanted):
            return "matched by exclude="
        if id(weight) not in tied:
            return None
        other = next(n for n in tied[id(weight)] if n != f"{name}.weight".lstrip("."))
        return f"its weight is shared with {other!r} and stays tied"

    layers: list[Layer] = []
    for name, module, weight in weighted:
        ready = not isinstance(weight, UninitializedParameter)
        shape = weight_shape(module) if ready else None
        sizes = tuple(weight.shape[::-1] if is_transposed(module) else weight.shape) if ready else ()
        params = sum(p.numel() for p in module.parameters(recurse=parametrize.is_parametrized(module))) if ready else 0
        own_bias = isinstance(getattr(module, "bias", None), nn.Parameter) and id(module.bias) not in tied
        why = reason(name, module, weight)
        fields: Any = (name, type(module).__name__, sizes, shape, params, why, module, own_bias)
        layers.append(Layer(*fields) if why else DecomposableLayer(*fields))
    return layers


def check_weight(layer: DecomposableLayer) -> None:
    """Raise WeightError unless the layer's weight has finite values."""
    weight = layer.module.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        raise WeightError(
            f"layer {label(layer.name)}: its weight is on the meta device and has no values; load the weights first "
            f"(for example with load_state_dict(..., assign=True))"
        )
    weight, limit = weight.detach(), 1e150  # squares of larger values would overflow
    low, high = map(float, weight.aminmax())  # NaN if there is one
    largest = max(-low, high)
    if 0 < largest < 1 / limit:
        raise WeightError(f"layer {label(layer.name)}: its largest weight is {largest:g}, below 1e-150; scale it up")
    if not largest <= limit:
        bad = int((~(weight.double().abs() <= limit)).sum())
        raise WeightError(
            f"layer {label(layer.name)}: {bad} of {weight.numel()} weights are NaN, infinite or above 1e150; mend "
            f"them, or leave the layer out with exclude={[layer.name]!r}"
        )
