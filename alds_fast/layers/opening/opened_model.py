"""A model whose modules that hold several weights, or one in a way of their own, are opened."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn

from ...checks import check_model
from ...selection import ModuleNames, Selection, patterns
from ..discovery import label, places_of
from ..obstacles import held_past_the_model, reason_around
from ..replacement import replace_layers
from ..shared_weights import is_freed, tied_names
from .openers import Opener, open_module, opener_of


def _closed(model: nn.Module) -> dict[str, tuple[nn.Module, Opener]]:
    """By name, the modules that have a way to be opened."""
    found = {name: (module, opener_of(module)) for name, module in model.named_modules()}
    return {name: (module, opener) for name, (module, opener) in found.items() if opener is not None}


def reasons_of_closed(model: nn.Module) -> dict[str, str | None]:
    """By name, for every module that has a way to be opened, why it stays as it is; None where it can be opened."""
    closed = _closed(model)
    if not closed:
        return {}
    places, held, tied = places_of(model), held_past_the_model(model), tied_names(model)

    def reason(name: str, module: nn.Module, opener: Opener) -> str | None:
        around = (why for place in places[id(module)] if (why := reason_around(place) or _inside_peft(place)))
        if why := next(around, None) or opener.why_not(module):
            return why
        tensors = [p for p in module._parameters.values() if p is not None]
        if freed := [p for p in tensors if is_freed(p) or not p.numel()]:
            return f"its weight is empty, {tuple(freed[0].shape)}, as in a sharded model; gather it first"
        if shared := [p for p in tensors if id(p) in tied]:
            return f"its weights are shared, {tied[id(shared[0])]}, and stay tied"
        holder = next((held[key] for key in (id(module), *map(id, tensors)) if key in held), None)
        return holder and f"{holder} holds it in a function, past the model; use it as a part of the model there"

    return {name: reason(name, *found) for name, found in closed.items()}


def _inside_peft(place: Any) -> str | None:
    """That an adapter of peft works with the module's weights."""
    owner = place[-1][0] if place else None
    if owner is None or not any(cls.__name__ == "BaseTunerLayer" for cls in type(owner).__mro__):
        return None
    return "peft's layer around it computes with its weights; merge_and_unload() the adapter first"


def _can_be_opened(model: nn.Module) -> Iterator[tuple[str, nn.Module, Opener]]:
    closed = _closed(model)
    yield from ((name, *closed[name]) for name, reason in reasons_of_closed(model).items() if reason is None)


def _has_parts(name: str, layers: Iterable[str]) -> bool:
    """Whether one of the layers is the module of that name, or in it."""
    return any(layer == name or layer.startswith(f"{name}." if name else "") for layer in layers)


def opened(model: nn.Module, exclude: Selection = None) -> nn.Module:
    """The model with every module opened that can be, in a copy that holds the model's own tensors.

    Modules that ``exclude`` means stay. The model itself where there is nothing to open. Raises
    ModelError if the model cannot be copied.
    """
    check_model(model)
    unwanted, places = patterns(exclude, "exclude") or (), ModuleNames(model)
    return _with_opened(model, [found for found in _can_be_opened(model) if not places.match(unwanted, found[0])])


def opened_for(model: nn.Module, layers: Collection[str]) -> nn.Module:
    """As :func:`opened`, but only of modules of which some of these layers, by name, are parts."""
    return _with_opened(model, [found for found in _can_be_opened(model) if _has_parts(found[0], layers)])


def _with_opened(model: nn.Module, found: Iterable[tuple[str, nn.Module, Opener]]) -> nn.Module:
    new = {name: open_module(module, opener) for name, module, opener in found}
    return replace_layers(model, new, share=True) if new else model


def put_opened(model: nn.Module, layers: Collection[str]) -> None:
    """As :func:`opened_for`, in the model itself, which is about to be loaded."""
    for name, module, opener in list(_can_be_opened(model)):
        if name and _has_parts(name, layers):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, open_module(module, opener))


def why_closed(model: nn.Module, exclude: Selection = None) -> dict[int, str]:
    """By id of a module that is not opened, and of those in it, the reason."""
    why: dict[int, str] = {}
    unwanted, places = patterns(exclude, "exclude") or (), ModuleNames(model)
    for name, reason in reasons_of_closed(model).items():
        module = model.get_submodule(name)
        if reason is None and not places.match(unwanted, name):
            continue  # as in models of checkpoint directories, whose layers say themselves what to do
        reason = reason or "matched by exclude="
        why |= {id(part): f"{label(name)} stays as it is: {reason}" for part in module.modules()}
        why[id(module)] = reason
    return why
