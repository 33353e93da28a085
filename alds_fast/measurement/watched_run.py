"""What a run of a model does with its layers: which are called, with what, and whose weights other code uses."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..layers import AbsentWeight
from .private_runs import check_runs, private_runs

# What low-rank layers answer in the place of a dense weight.
_HARMLESS = {name for name in dir(AbsentWeight) if not name.startswith("_")} | {"shape", "ndim", "requires_grad"}


class LayerCall(NamedTuple):
    """A layer, and of what it was called with the first tensor's shape and sum of absolute values."""

    name: str
    shape: tuple[int, ...]
    total: float


@dataclass
class Watch:
    """What was seen: ``calls`` in their order; ``readers``, by name of a layer the class whose code used its weight."""

    calls: list[LayerCall] = field(default_factory=list)
    readers: dict[str, str] = field(default_factory=dict)


class _Uses(TorchFunctionMode):
    """Notes the functions of torch that are given a layer's weight outside of its own forward."""

    def __init__(self, layers: Mapping[str, nn.Module], inside: list[str], readers: dict[str, str]) -> None:
        super().__init__()
        self.layers, self.inside, self.readers = layers, inside, readers
        weights = {name: layer._parameters.get("weight") for name, layer in layers.items()}
        self.weights = {id(weight): name for name, weight in weights.items() if weight is not None}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for part in tree_leaves([args, kwargs]):
            name = self.weights.get(id(part)) if isinstance(part, Tensor) else None
            if name is not None and name not in self.inside and name not in self.readers and not _is_asking(func):
                reader = _module_at_work(self.layers[name])
                if not reader.__module__.startswith("torch."):  # torch's encoders look first whether it is there
                    self.readers[name] = reader.__name__
        return func(*args, **(kwargs or {}))


def _is_asking(function: Any) -> bool:
    """Whether it is an attribute of tensors, or a method, that needs none of their values."""
    owner = getattr(function, "__self__", None)  # that of an attribute's getter
    return getattr(owner if function.__name__ == "__get__" else function, "__name__", "") in _HARMLESS


def _module_at_work(layer: nn.Module) -> type:
    """The class of the innermost module whose method is at work, that layer's own excepted."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module is not layer:
            return type(module)
        frame = frame.f_back  # type: ignore[assignment]
    return nn.Module


def fingerprint(name: str, args: Any) -> LayerCall:
    """What tells one call from another."""
    x = next((part for part in tree_leaves(args) if isinstance(part, Tensor)), None)
    return LayerCall(name, *(((), 0.0) if x is None else (tuple(x.shape), float(x.detach().double().abs().sum()))))


@contextmanager
def as_written() -> Iterator[None]:
    """Compiled models run as they were written; torch's encoders call their layers instead of a kernel of their own.

    That kernel's outputs at padding are others.
    """
    loaded, fast = "torch._dynamo" in sys.modules, torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager") if loaded else nullcontext():  # else nothing was compiled
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def watching(
    layers: Mapping[str, nn.Module], stand_ins: Mapping[str, nn.Module] | None = None, *, uses: bool = False
) -> Iterator[Watch]:
    """Watch calls of these layers and, if asked for, uses of their weights, in the runs inside.

    With ``stand_ins``, these run in the layers' places.
    """
    watch, inside = Watch(), []

    def watched(name: str, layer: nn.Module) -> Any:
        forward = layer.forward if stand_ins is None else stand_ins[name].forward

        def call(*args: Any, **kwargs: Any) -> Any:
            inside.append(name)
            try:
                watch.calls.append(fingerprint(name, [args, kwargs]))
                return forward(*args, **kwargs)
            finally:
                inside.pop()

        return call

    before = {name: vars(layer).get("forward") for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            vars(layer)["forward"] = watched(name, layer)
        with as_written(), _Uses(layers, inside, watch.readers) if uses else nullcontext():
            yield watch
    finally:
        for name, layer in layers.items():
            vars(layer).pop("forward")
            vars(layer).update({} if before[name] is None else {"forward": before[name]})


def weight_readers(model: nn.Module, layers: Mapping[str, nn.Module], inputs: Any, name: str) -> dict[str, str]:
    """By name of a layer, the class whose code uses its weight in a run of the model instead of calling it.

    ``name`` is what errors call the inputs. Warns where a model runs, but not while it is watched. Raises ModelError,
    or ArgumentError, for inputs with which it does not run.
    """
    try:
        with watching(layers, uses=True) as watch, private_runs(model) as run:
            run(inputs, 0, name)
            return watch.readers
    except Exception as e:
        check_runs(model, inputs, name)
        warnings.warn(
            f"uses of layers' weights could not be watched ({type(e).__name__}: {e}): layers whose weights the model "
            f"uses without calling them are known by its source code only",
            stacklevel=4,
        )
        return {}
