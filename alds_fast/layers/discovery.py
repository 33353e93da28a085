"""Find the layers of a model that can be factorised, and say why the others are left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from ..checks import check_model
from ..errors import BudgetError, WeightError
from ..linalg import WeightShape
from ..selection import ModuleNames, Selection, patterns
from .base import LowRankLayer
from .obstacles import SHARDED, Ancestors, held_past_the_model, is_quantised, readers, reasons_text, structural_reason
from .registry import STORED, filters_first, is_table, stored_params, weight_shape
from .shared_weights import tied_names


@dataclass(frozen=True)
class Layer:
    """A module with a weight of two or more dimensions, under its first name in the model.

    ``shape`` is None unless it is a Linear (transformers' Conv1D too), a convolution or a low-rank layer; ``reason``
    says in words why it is left out, None for a :class:`DecomposableLayer`; ``params`` counts its own parameters
    (weight and bias); ``own_bias`` is true for a bias that it shares with no other module, and that no code around it
    reads.
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

    @property
    def stored(self) -> int:
        """Parameters of its weight, in the form that the model has it in."""
        return stored_params(self.module)

    @property
    def is_table(self) -> bool:
        """Whether rows are looked up in its weight: it has fold 0 with one slice, and is judged by its outputs."""
        return is_table(self.module)

    @property
    def fold(self) -> tuple[int, int] | None:
        """(scheme, slices) of a low-rank layer, which is cut in no other; None for a dense one."""
        return self.module.decomposition.fold if isinstance(self.module, LowRankLayer) else None


def decomposable(layers: Iterable[Layer]) -> list[DecomposableLayer]:
    """Those of the layers that are not left out.

    >>> [layer.name for layer in decomposable(find_layers(nn.Sequential(nn.Linear(4, 2), nn.RNN(5, 2))))]
    ['0']
    """
    return [layer for layer in layers if isinstance(layer, DecomposableLayer)]


def count_params(model: nn.Module) -> int:
    """Number of parameters of the model, shared ones once, those not initialised yet not at all.

    Indices of pivots count as parameters (:mod:`alds_fast.linalg.pivots`), int8 factors and their scales too.
    """
    buffered = sum(_count_buffered(m) for m in model.modules())
    return sum(p.numel() for p in model.parameters() if not isinstance(p, UninitializedParameter)) + buffered


def _count_buffered(module: nn.Module) -> int:
    """Numbers that a low-rank layer has in buffers, where others have parameters."""
    held = module._buffers.values() if isinstance(module, LowRankLayer) else ()
    return sum(b.numel() for b in held if b is not None)


def count_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and persistent buffers, shared ones once, those not initialised yet not at all."""
    tensors: dict[int, Tensor] = {id(t): t for t in model.parameters()}
    for module in model.modules():
        kept = set(module._buffers.keys()) - set(module._non_persistent_buffers_set)
        tensors |= {id(b): b for name in kept if (b := module._buffers[name]) is not None}
    return sum(t.numel() * t.element_size() for t in tensors.values() if not isinstance(t, UninitializedParameter))


def label(name: str) -> str:
    """How a layer is called in messages; the model itself has the empty name."""
    return repr(name) if name else "the model itself"


def _weight_of(module: nn.Module) -> Tensor | None:
    """The module's weight: of a layer that is decomposed, whatever it is; of others the first of two dimensions."""
    if parametrize.is_parametrized(module):
        return next(iter(module.parameters()))
    if weight_shape(module) is not None:
        weight = vars(module).get("weight", module._parameters.get("weight"))
        if isinstance(weight, Tensor):
            return weight
    weights = [p for p in module._parameters.values() if p is not None]
    return next((p for p in weights if isinstance(p, UninitializedParameter) or p.dim() >= 2), None)


def places_of(model: nn.Module) -> dict[int, list[Ancestors]]:
    """For each module (by id) where it stands: under every module that holds it."""
    places: dict[int, list[Ancestors]] = {id(model): [()]}
    waiting: list[tuple[nn.Module, Ancestors]] = [(model, ())]
    for module, above in waiting:  # it grows
        for name, child in module.named_children():
            place = (*above, (module, name))
            if id(child) not in places:
                waiting.append((child, place))
            places.setdefault(id(child), []).append(place)
    return places


def _sizes(module: nn.Module, weight: Tensor | None) -> tuple[int, ...]:
    """The weight's shape with the filters first; () without one, or before its first forward pass."""
    if isinstance(module, LowRankLayer):
        return module.weight_shape.weight
    if weight is None or isinstance(weight, UninitializedParameter) or weight.is_nested:
        return ()
    shape = weight_shape(module)
    if shape is None or weight.dim() != len(shape.weight) or not weight.numel():  # of a sharded layer
        return tuple(weight.shape)
    return tuple(filters_first(module, torch.empty(weight.shape, device="meta")).shape)


def find_layers(model: nn.Module, include: Selection = None, exclude: Selection = None) -> list[Layer]:
    """Every module with a weight of two or more dimensions, in the model's order, with the reason if it is left out.

    ``include`` and ``exclude`` are names, patterns or classes, see :class:`alds_fast.selection.ModuleNames`.
    Raises ModelError if ``model`` is not an ``nn.Module``, and LayerNotFoundError for what means no layer.
    """
    check_model(model)
    wanted, unwanted = patterns(include, "include") or (), patterns(exclude, "exclude") or ()
    places = places_of(model)
    weighted = [
        (n, m, w)
        for n, m in model.named_modules()
        if "parametrizations" not in n.split(".")
        and ((w := _weight_of(m)) is not None or weight_shape(m) is not None or is_quantised(m))
    ]
    names, selection = [n for n, _, _ in weighted], ModuleNames(model)
    selection.check(wanted, names, "include")
    selection.check(unwanted, names, "exclude")
    tied, held = tied_names(model), held_past_the_model(model)

    def reason(name: str, module: nn.Module, weight: Tensor | None) -> str | None:
        structural = structural_reason(module, places[id(module)])
        if structural:
            return structural
        if include is not None and not selection.match(wanted, name):
            return "not matched by include="
        if selection.match(unwanted, name):
            return "matched by exclude="
        weights = [module.encoder, module.decoder] if isinstance(module, LowRankLayer) else [weight]
        shared = next((w for w in weights if id(w) in tied), None)
        if shared is not None:
            other = next(n for n in tied[id(shared)] if n.rpartition(".")[0] != name)
            return f"its weight is shared with {other!r} and stays tied"
        holder = held.get(id(module)) or held.get(id(weight))
        return holder and f"{holder} holds it in a function, past the model; use it as a part of the model there"

    layers: list[Layer] = []
    for name, module, weight in weighted:
        ready = isinstance(weight, Tensor) and not isinstance(weight, UninitializedParameter)
        ready = ready or isinstance(module, LowRankLayer)  # of int8 factors, which are no parameters
        shape = weight_shape(module) if ready else None
        sizes = _sizes(module, weight)
        params = sum(p.numel() for p in module.parameters(recurse=parametrize.is_parametrized(module))) if ready else 0
        params += _count_buffered(module)
        params += vars(module).get(STORED, shape.numel) - shape.numel if shape else 0
        own_bias = isinstance(getattr(module, "bias", None), nn.Parameter) and id(module.bias) not in tied
        own_bias = own_bias and not any(next(readers(place, "biases"), None) for place in places[id(module)])
        why = reason(name, module, weight)
        fields: Any = (name, type(module).__name__, sizes, shape, params, why, module, own_bias)
        layers.append(Layer(*fields) if why else DecomposableLayer(*fields))
    return layers


def left_out_text(layers: Iterable[Layer]) -> str:
    """In words why layers are left out."""
    why = reasons_text((label(layer.name), layer.reason) for layer in layers if layer.reason)
    return why or "there is none with a weight of two or more dimensions"


@contextmanager
def saying_what_is_left_out(layers: Sequence[Layer]) -> Iterator[None]:
    """A BudgetError inside says why layers are left out."""
    try:
        yield
    except BudgetError as e:
        if all(isinstance(layer, DecomposableLayer) for layer in layers) and layers:
            raise
        what = "left out" if decomposable(layers) else "no layer can be decomposed"
        raise BudgetError(f"{e}; {what}: {left_out_text(layers)}") from e


def check_weights_are_there(layers: Sequence[Layer]) -> None:
    """Raise WeightError, with the reasons, if no layer can be decomposed and weights lie elsewhere (sharded models)."""
    if not decomposable(layers) and any(SHARDED in layer.reason for layer in layers if layer.reason):
        raise WeightError(f"no layer of the model can be decomposed: {left_out_text(layers)}")
