"""Launches in which everything but the tensors stays as it is. Importing this needs no triton."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor


class Launch:
    """A kernel with its grid, numbers and constants, to be called with tensors of one kind.

    The first call compiles, and has Triton look at every argument. Later ones hand theirs to the compiled kernel, which
    saves a host most of a launch: their tensors must have the types of the first ones, None where these are None, and
    begin at multiples of 16 bytes where these do.
    """

    def __init__(
        self, kernel: Any, grid: Sequence[int], numbers: Sequence[int], constants: Mapping[str, Any], **options: Any
    ) -> None:
        self._kernel, self._grid, self._numbers = kernel, (*grid, 1, 1)[:3], tuple(numbers)
        self._constants, self._options = constants, options
        self._compiled: Callable[..., Any] | None = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch it on the current device and stream; the tensors are the kernel's first arguments."""
        if self._compiled is not None:
            self._compiled(*tensors, *self._rest)
            return
        compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._constants, **self._options)
        if is_on_device(tensors) and hasattr(type(compiled), "__getitem__"):  # hooks of Triton may give something else
            names = self._kernel.arg_names[len(tensors) + len(self._numbers) :]
            self._rest = (*self._numbers, *(self._constants[name] for name in names))
            self._compiled = compiled[self._grid]


def is_on_device(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a kernel of these is launched: not only compiled."""
    return tensors[0] is not None and tensors[0].is_cuda
