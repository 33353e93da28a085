"""Which kinds of modules can be opened, and by what; ``register`` adds kinds of a user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, overload

from torch import nn

from ...errors import ArgumentError, ModelError
from ...selection import WAS, names_of_class
from ..obstacles import reason_of_hooks
from ..registry import LOW_RANK, STORED, stored_params, weight_shape
from . import attention, folded, own_forward, same_padding

Open = Callable[[nn.Module], nn.Module]
_Function = TypeVar("_Function", bound=Callable[..., nn.Module])


class Opener(NamedTuple):
    """A way to open a kind of module: ``why_not`` says why one stays as it is, ``open`` gives what takes its place.

    What takes its place may hold the module's own tensors; nothing of the module is changed.
    """

    takes: Callable[[nn.Module], bool]
    why_not: Callable[[nn.Module], str | None]
    open: Open


def _why_attention(module: nn.Module) -> str | None:
    return reason_of_hooks(module) or attention.why_attention_stays(module)


OPENERS: list[Opener] = [
    Opener(lambda m: isinstance(m, nn.MultiheadAttention), _why_attention, attention.OpenedAttention),
    Opener(folded.has_weight_norm, folded.why_norm_stays, folded.without_norm),
    Opener(same_padding.pads_to_same, reason_of_hooks, same_padding.same_padded),
    Opener(folded.is_standardised, reason_of_hooks, folded.with_standardised_weight),
    Opener(own_forward.computes_the_same, reason_of_hooks, own_forward.as_linear),
]


def opener_of(module: nn.Module) -> Opener | None:
    """The way to open it; None for modules that there is none for."""
    return next((opener for opener in OPENERS if opener.takes(module)), None)


REGISTERED = "alds_registered"  # what a user's function has given


def open_module(module: nn.Module, opener: Opener) -> nn.Module:
    """What takes the module's place; of a single layer it is kept how many parameters go with the module."""
    new = opener.open(module).train(module.training)
    vars(new)[WAS] = names_of_class(type(module))
    layers = [part for part in new.modules() if weight_shape(part) is not None]
    if len(layers) == 1:
        counts = [sum(p.numel() for p in part.parameters()) for part in (module, new)]
        vars(layers[0])[STORED] = stored_params(layers[0]) + counts[0] - counts[1]
    return new


@overload
def register(kind: type[nn.Module]) -> Callable[[_Function], _Function]: ...
@overload
def register(kind: type[nn.Module], open: _Function) -> _Function: ...
def register(kind: type[nn.Module], open: Any = None) -> Any:
    """Have layers of a type of your own decomposed.

    Args:
        kind: the type; modules of it, not of its subclasses, are meant.
        open: a function that gives, for such a module, one of torch's layers (Linear, a convolution, transposed or not)
            that computes the same, or a module made of these. It may hold the very parameters of the module, and must
            not change it. Without it, ``register(kind)`` is a decorator of that function.

    Returns:
        The function.

    In a compressed model the layer is low-rank, or of a module made of layers those are; where nothing is compressed,
    the module stays as it is. A registration is of the process: call it before loading a saved model too.

    Raises:
        ArgumentError: ``kind`` is no type of modules, or one that needs none.
        ModelError: later, from whoever opens a model: the function has raised an exception or given no module, or one
            that has more parameters; from analyze with data or example inputs: that computes something else.

    >>> import torch
    >>> class MyLinear(nn.Module):
    ...     def __init__(self, inputs, outputs):
    ...         super().__init__()
    ...         self.matrix = nn.Parameter(torch.randn(inputs, outputs))
    ...     def forward(self, x):
    ...         return x @ self.matrix
    >>> @register(MyLinear)
    ... def as_linear(module):
    ...     linear = nn.Linear(*module.matrix.shape, bias=False, device="meta")
    ...     linear.weight = nn.Parameter(module.matrix.detach().T)
    ...     return linear
    >>> import alds_fast as alds
    >>> type(alds.compress(nn.Sequential(MyLinear(32, 32)), params=0.5)[0]).__name__
    'LowRankLinear'
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)) or kind in (*LOW_RANK, nn.Module):
        raise ArgumentError(f"kind={kind!r} is no type of modules of your own; pass the class of your layers")
    if open is not None and not callable(open):
        raise ArgumentError(f"open is a {type(open).__name__}: expected a function of a {kind.__name__}")

    def add(function: _Function) -> _Function:
        OPENERS.insert(0, Opener(lambda m: type(m) is kind, reason_of_hooks, _checked(kind, function)))
        return function

    return add if open is None else add(open)


def _checked(kind: type[nn.Module], function: Callable[..., nn.Module]) -> Open:
    def open(module: nn.Module) -> nn.Module:
        try:
            new = function(module)
        except Exception as e:
            raise ModelError(
                f"the function registered for {kind.__name__} failed ({type(e).__name__}: {e}); mend it, or leave the "
                f"layers out with exclude="
            ) from e
        if not isinstance(new, nn.Module) or new is module:
            raise ModelError(f"the function registered for {kind.__name__} gave {new!r:.60}, not another module")
        before, after = (sum(p.numel() for p in part.parameters()) for part in (module, new))
        layers = sum(weight_shape(part) is not None for part in new.modules())
        if not layers or after > before or (after < before and layers > 1):
            raise ModelError(
                f"the function registered for {kind.__name__} gave {layers} layers and {after:,} parameters in "
                f"the place of {before:,}; return a Linear or convolution, or a module of layers with as many"
            )
        vars(new)[REGISTERED] = True
        return new

    return open
