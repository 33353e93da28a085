"""What a layer is called with, without the values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class InputSpec:
    """The first tensor argument of a layer's call, without its values.

    ``device`` is the text of a torch device; ``channels_last`` is True for a tensor of four or five dimensions whose
    channels are innermost in memory. Other layouts (transposed views) are recorded as contiguous. ``autocast`` is the
    type of torch.autocast during the call, None where it is off.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    channels_last: bool
    autocast: torch.dtype | None = None

    @classmethod
    def of(cls, x: Tensor) -> InputSpec:
        """The description of a tensor."""
        wanted = _FORMATS.get(x.dim())
        last = wanted is not None and not x.is_contiguous() and x.is_contiguous(memory_format=wanted)
        kind = x.device.type
        on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return cls(tuple(x.shape), x.dtype, str(x.device), last, torch.get_autocast_dtype(kind) if on else None)

    def make(self, seed: int = 0) -> Tensor:
        """A tensor like that, drawn from the standard normal distribution (whole numbers for an integer type)."""
        generator = torch.Generator().manual_seed(seed)
        kind = self.dtype if self.dtype.is_floating_point or self.dtype.is_complex else torch.float32
        x = torch.randn(self.shape, generator=generator, dtype=kind, device="cpu").to(self.device, self.dtype)
        return x.contiguous(memory_format=_FORMATS[x.dim()]) if self.channels_last else x

    def empty(self) -> Tensor:
        """A tensor of that shape, type and device whose values are not set."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def caller(self, module: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
        """``module(x)`` as a call without arguments, under the autocast that was on."""
        if self.autocast is None:
            return partial(module, x)

        def call() -> Any:
            with torch.autocast(x.device.type, self.autocast):
                return module(x)

        return call

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        names = {n: str(t).removeprefix("torch.") for n in ("dtype", "autocast") if (t := getattr(self, n))}
        return {**vars(self), "shape": list(self.shape), **names}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> InputSpec:
        """Inverse of :meth:`to_dict`; ArgumentError for anything else."""
        try:
            dtype, shape = getattr(torch, fields["dtype"]), tuple(fields["shape"])
            auto = fields.get("autocast")
            auto = None if auto is None else getattr(torch, auto)
            spec = cls(shape, dtype, str(torch.device(fields["device"])), fields["channels_last"], auto)
        except (TypeError, KeyError, AttributeError, RuntimeError) as e:
            raise ArgumentError(f"not the description of an input: {fields!r} ({e!r})") from e
        sizes = all(type(n) is int and n >= 0 for n in shape)
        types = isinstance(dtype, torch.dtype) and isinstance(auto, torch.dtype | None)
        if not (sizes and types and isinstance(spec.channels_last, bool)):
            raise ArgumentError(f"not the description of an input: {fields!r}")
        return spec
