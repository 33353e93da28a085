"""What a layer is called with, without the values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_model
from ..errors import ArgumentError, LayerNotFoundError
from .private_runs import check_runs
from .run_model import _check_example, first_input

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
        """A tensor like that, drawn from the standard normal distribution (0 or 1 for an integer type)."""
        generator = torch.Generator().manual_seed(seed)
        kind = self.dtype if self.dtype.is_floating_point or self.dtype.is_complex else torch.float32
        x = torch.randn(self.shape, generator=generator, dtype=kind, device="cpu")
        x = (x if kind == self.dtype else x > 0).to(self.device, self.dtype)
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


def _first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)


def layer_inputs(model: nn.Module, example_inputs: Any, names: Iterable[str]) -> dict[str, dict[InputSpec, int]]:
    """Which inputs each named layer gets in one run of the model, and how often.

    The model runs once (:func:`alds_fast.measurement.private_runs`) and is left as it was. A layer that is never called
    has an empty dict.

    Raises:
        ArgumentError: ``example_inputs`` is nothing that can be passed on.
        LayerNotFoundError: a name is not in the model.
        ModelError: the model is not a module, or raised an exception of its own.
    """
    check_model(model)
    _check_example(example_inputs, "example_inputs")
    modules = dict(model.named_modules(remove_duplicate=False))
    inputs: dict[str, dict[InputSpec, int]] = {name: {} for name in names}
    for name in inputs:
        if name not in modules:
            raise LayerNotFoundError(f"layer {name!r} is not in the model; analyse this model again")

    def recorder(counts: dict[InputSpec, int]) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _first_tensor(args, kwargs)
            if x is not None:
                spec = InputSpec.of(x)
                counts[spec] = counts.get(spec, 0) + 1

        return record

    handles = [modules[n].register_forward_pre_hook(recorder(c), with_kwargs=True) for n, c in inputs.items()]
    try:
        check_runs(model, example_inputs, "example_inputs")
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def shared_inputs(model: nn.Module, example_inputs: Any, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of two or more of the named layers that get the very same tensors, unchanged, in one run of the model."""
    calls: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    alive: list[Tensor] = []  # so that no identity is given out twice

    def recorder(seen: list[tuple[int, int]]) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_input(args, kwargs)
            if isinstance(x, Tensor):
                alive.append(x)
                seen.append((id(x), 0 if x.is_inference() else x._version))

        return record

    modules: Mapping[str, nn.Module] = dict(model.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(recorder(seen), with_kwargs=True) for name, seen in calls.items()
    ]
    try:
        check_runs(model, example_inputs, "example_inputs")
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for name, seen in calls.items():
        if seen:
            groups.setdefault(tuple(seen), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]
