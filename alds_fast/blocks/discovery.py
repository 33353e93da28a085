"""Which modules of a model may be its blocks, by how it is built."""

from __future__ import annotations

import torch
from torch import nn

_CONTAINERS = nn.ModuleList, nn.Sequential


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the modules that look like blocks: members of lists and sequences that are made of other modules.

    Lists in lists are gone through, and so is a block with more than half of all blocks' parameters where it has blocks
    itself; others are not. Whether they are a chain only a run can tell, see :func:`alds_fast.blocks.find_chain`.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
    >>> find_blocks(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    ['layers.0', 'layers.1']
    """
    names, before = _inside(model, ""), None
    while names != before:
        names, before = _open_largest(model, names), names
    return names


def _open_largest(model: nn.Module, names: list[str]) -> list[str]:
    sizes = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in names}
    opened = []
    for name in names:
        inner = _inside(model.get_submodule(name), name) if 2 * sizes[name] > sum(sizes.values()) else []
        opened += inner or [name]
    return opened


def _inside(module: nn.Module, name: str) -> list[str]:
    names = []
    for part, child in module.named_children():
        path = f"{name}.{part}" if name else part
        if type(module) in _CONTAINERS and type(child) not in _CONTAINERS and next(child.children(), None) is not None:
            names += [path] if _can_be_skipped(child) else []
        else:
            names += _inside(child, path)
    return names


def _can_be_skipped(module: nn.Module) -> bool:
    """Whether another forward may stand in for its own: not where a call does not look it up."""
    return not isinstance(module, torch.jit.ScriptModule) and getattr(module, "_compiled_call_impl", None) is None
