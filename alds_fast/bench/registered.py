"""Functions of users that take turns with the library's ways."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..errors import ArgumentError

LINEAR, CONV = "linear", "conv"
SIDES = ("dense", "two_op", "compiled", "fused", "deployed", "padded", "separate", "merged_two_op")
_REGISTERED: dict[str, dict[str, Callable[..., Tensor]]] = {LINEAR: {}, CONV: {}}


def add_way(name: str, function: Callable[..., Tensor] | None, op: str = LINEAR) -> None:
    """Time a function of your own beside the library's, in every benchmark of this process; None takes it out.

    Args:
        name: what its rows are called.
        function: called as :func:`alds_fast.kernels.lowrank_linear` is, ``function(x, encoder, decoder, bias,
            groups=...)``, or for convolutions as ``lowrank_conv2d``, with ``padding=`` too; without ``backend=``.
        op: "linear" or "conv".

    Raises:
        ArgumentError: the name is one of the library's sides, the function none, or ``op`` another word.

    >>> add_way("mine", lambda x, encoder, decoder, bias, groups: x @ (decoder @ encoder).mT)
    >>> add_way("mine", None)
    """
    if not isinstance(op, str) or op not in _REGISTERED:
        raise ArgumentError(f"op={op!r} is neither 'linear' nor 'conv'")
    if not isinstance(name, str) or not name.isidentifier() or name in SIDES:
        raise ArgumentError(f"name={name!r}: expected a word of letters and digits, and none of {', '.join(SIDES)}")
    if function is None:
        _REGISTERED[op].pop(name, None)
    elif callable(function):
        _REGISTERED[op][name] = function
    else:
        raise ArgumentError(f"function={function!r} cannot be called")


def functions_of(op: str) -> list[tuple[str, Callable[..., Tensor]]]:
    """Names and functions that are called for an operation."""
    return [*_REGISTERED[op].items()]


def registered_names() -> list[str]:
    """What functions of users are called."""
    return [name for functions in _REGISTERED.values() for name in functions]
