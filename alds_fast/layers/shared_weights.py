"""Parameters and buffers that several modules hold, or that share memory: find them, keep them shared in a copy."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


def _owners(model: nn.Module) -> tuple[dict[int, list[str]], dict[int, Tensor]]:
    """For each parameter or buffer (by id) its names, one per module that holds it, and the tensor."""
    names: dict[int, list[str]] = {}
    parameters: dict[int, Tensor] = {}
    for prefix, module in model.named_modules():
        for attribute, p in [*module._parameters.items(), *module._buffers.items()]:
            if p is not None:
                names.setdefault(id(p), []).append(f"{prefix}.{attribute}" if prefix else attribute)
                parameters[id(p)] = p
    return names, parameters


_PLAIN_TYPES = {*nn.Parameter.__mro__, *nn.Buffer.__mro__}


def has_plain_type(tensor: Tensor) -> bool:
    """Whether it is a tensor or parameter as torch makes them, and no subclass that computes in its own way (quantised
    by torchao, sharded as a DTensor, fake, not initialised yet).
    """
    others = [cls for cls in type(tensor).__mro__ if cls not in _PLAIN_TYPES]
    return not any(vars(cls).keys() & {"__torch_dispatch__", "__torch_function__"} for cls in others)


def has_plain_memory(tensor: Tensor) -> bool:
    """Whether its numbers lie in one piece of memory, at strides."""
    if not has_plain_type(tensor) or tensor.layout != torch.strided:
        return False
    return not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)


def is_freed(tensor: Tensor) -> bool:
    """Whether its memory was given back, as sharded training does between steps."""
    return has_plain_memory(tensor) and bool(tensor.numel()) and not tensor.untyped_storage().size()


def _extent(p: Tensor) -> tuple[int, int]:
    """First byte and the one after the last, in the storage."""
    start = int(p.storage_offset()) * p.element_size()
    last = sum((int(n) - 1) * int(s) for n, s in zip(p.shape, p.stride(), strict=True))
    return start, start + (last + 1) * p.element_size()


def overlaps(parameters: dict[int, Tensor]) -> list[tuple[int, int]]:
    """Pairs of different tensors (by id) whose memory overlaps; every tensor that overlaps another is in a pair."""
    by_storage: dict[tuple, list[tuple[int, int, int]]] = {}
    for key, p in parameters.items():
        if has_plain_memory(p) and p.numel() and not is_freed(p):
            by_storage.setdefault((p.device, p.untyped_storage().data_ptr()), []).append((*_extent(p), key))
    pairs = []
    for extents in by_storage.values():
        _, reach, owner = min(extents)
        for start, end, key in sorted(extents)[1:]:
            if start < reach:
                pairs.append((owner, key))
            if end > reach:
                reach, owner = end, key
    return pairs


def tied_names(model: nn.Module) -> dict[int, list[str]]:
    """For each tied parameter (by id) all names under which it or its memory is held, two or more."""
    names, parameters = _owners(model)
    tied = {key: list(own) for key, own in names.items() if len(own) > 1}
    for first, second in overlaps(parameters):
        both = [*names[first], *names[second]]
        tied[first] = [*tied.get(first, []), *both]
        tied[second] = [*tied.get(second, []), *both]
    return tied


def copy_shared_memory(model: nn.Module, memo: dict[int, object]) -> None:
    """Put copies of tensors that share memory in a ``deepcopy`` memo; a plain deep copy would separate them."""
    _, parameters = _owners(model)
    storages: dict[int, torch.UntypedStorage] = {}
    for key in itertools.chain.from_iterable(overlaps(parameters)):
        p = parameters[key]
        if key in memo:
            continue
        storage = p.untyped_storage()
        copied = storages.setdefault(storage.data_ptr(), storage.clone())
        data = torch.empty(0, dtype=p.dtype, device=p.device)
        data = data.set_(copied, p.storage_offset(), p.shape, p.stride())
        memo[key] = nn.Parameter(data, p.requires_grad) if isinstance(p, nn.Parameter) else data
