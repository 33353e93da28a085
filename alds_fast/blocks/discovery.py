"""Which modules of a model may be its blocks, by how it is built."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import ArgumentError

_CONTAINERS = nn.ModuleList, nn.Sequential


def find_blocks(model: nn.Module, lists: Sequence[str] | None = None) -> list[str]:
    """Names of the modules that look like blocks: members of lists and sequences that are made of other modules.

    Lists in lists are gone through, and so is a block with more than half of all blocks' parameters where it has blocks
    itself; others are not. With ``lists`` the members of these, by name. Whether they are a chain only a run can tell,
    see :func:`alds_fast.blocks.find_chain`.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
    >>> find_blocks(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    ['layers.0', 'layers.1']
    """
    if lists is not None:
        return [f"{name}.{part}" for name in lists for part, _ in _list(model, name).named_children()]
    names, before = _inside(model, ""), None
    while names != before:
        names, before = _open_largest(model, names), names
    return names


def check_lists(blocks: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """The names in ``blocks=``, a sequence or one string with commas; ArgumentError for what is no name."""
    if blocks is None:
        return None
    names = blocks.split(",") if isinstance(blocks, str) else blocks
    if not isinstance(names, Sequence) or not names or not all(isinstance(n, str) and n.strip() for n in names):
        raise ArgumentError(f'blocks={blocks!r}: expected names of lists of blocks, "model.layers" for one')
    return tuple(name.strip() for name in names)


def _list(model: nn.Module, name: str) -> nn.Module:
    """The list of blocks of that name; ArgumentError if there is none, or nothing in it."""
    lists = {n: m for n, m in model.named_modules() if type(m) in _CONTAINERS or isinstance(m, nn.ModuleList)}
    if name in lists and len(list(lists[name].children())):
        return lists[name]
    full = [n for n, m in lists.items() if n and next(m.children(), None) is not None]
    why = "is empty" if name in lists else "is no list of the model"
    raise ArgumentError(f"blocks={name!r} {why}; it has {', '.join(full[:8]) or 'none'}")


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
