"""Moments and batches of inputs in files: tensors by name, and JSON that names them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..criteria import Moments
from ..errors import ArgumentError
from ..layers import has_plain_memory
from .safetensors_reader import CODES

MOMENT_TENSORS = ("second", "mean", "output", "held")  # of moments, beside their gradients
MOMENT_NUMBERS = ("rows", "noise", "mean_noise")
Read = Callable[[str], Tensor]


def tensors_of_moments(
    results: Mapping[str, Moments], more_tensors: Sequence[str] = (), more_numbers: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, each once, and by layer its numbers and which tensors are its own; of gradients what is named."""
    tensors: dict[str, Tensor] = {}
    known: dict[int, str] = {}
    notes: dict[str, Any] = {}
    for name, moments in results.items():
        places = {}
        for field in (*MOMENT_TENSORS, *more_tensors):
            value = getattr(moments, field)
            if value is not None:
                places[field] = known.setdefault(id(value), f"{name}.{field}")
                tensors[places[field]] = value
        numbers = {field: getattr(moments, field) for field in (*MOMENT_NUMBERS, *more_numbers)}
        notes[name] = {**numbers, "tensors": places}
    return tensors, notes


def batch_to_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for a batch of tensors, numbers and texts in tuples, lists and mappings; tensors are added, by name.

    Raises ArgumentError for anything else.
    """
    if isinstance(value, Tensor) and has_plain_memory(value) and value.dtype in CODES:
        place = f"inputs.{len(tensors)}"
        tensors[place] = value.detach().cpu()
        return {"tensor": place, "on_cpu": value.device.type == "cpu"}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"mapping": {key: batch_to_json(item, tensors) for key, item in value.items()}}
    if type(value) in (tuple, list):
        return {type(value).__name__: [batch_to_json(item, tensors) for item in value]}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    what = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise ArgumentError(
        f"the batch that the analysis keeps holds {what}, which no file can hold: pass analyze(example_inputs=) plain "
        f"tensors, numbers and texts in tuples, lists and dicts"
    )


def batch_from_json(note: Mapping[str, Any], read: Read, device: torch.device) -> Any:
    """The batch; tensors that were not on the CPU go to that device, mappings become dicts."""
    kind = next(iter(note))
    if kind == "tensor":
        return read(note["tensor"]).to("cpu" if note["on_cpu"] else device)
    if kind == "mapping":
        return {key: batch_from_json(item, read, device) for key, item in note["mapping"].items()}
    if kind == "value":
        return note["value"]
    items: Iterable[Any] = (batch_from_json(item, read, device) for item in note[kind])
    return tuple(items) if kind == "tuple" else list(items)
