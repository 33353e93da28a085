"""What hangs on a model: objects that cannot be copied, and functions that hold a layer past the model."""

from __future__ import annotations

import collections
import copy
import functools
import types
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import weight_shape

_PLAIN = (str, bytes, int, float, complex, type(None), type, types.ModuleType, torch.dtype, torch.device, torch.Size)
_ENDS = (*_PLAIN, Tensor, types.FunctionType, weakref.ref, torch.jit.ScriptModule)
_TABLES = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque)
_COMPILED = "_compiled_call_impl"  # of module.compile(), which torch leaves out of copies


def _parts(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(path, part) of what an object holds, as a deep copy goes through it."""
    if isinstance(value, _ENDS):
        return
    if isinstance(value, dict):
        yield from ((f"{path}[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, _CONTAINERS):
        yield from ((f"{path}[{i}]", part) for i, part in enumerate(value))
    elif isinstance(value, types.MethodType):
        yield f"{path}.__self__", value.__self__
    elif isinstance(value, functools.partial):
        yield from ((f"{path}.{name}", getattr(value, name)) for name in ("func", "args", "keywords"))
    elif isinstance(value, nn.Module):
        yield from ((f"{path}.{key}", part) for table in _TABLES for key, part in vars(value)[table].items())
    if type(value).__name__ == "OptimizedModule":  # which makes its functions anew
        return
    for name, part in getattr(value, "__dict__", {}).items():
        empty = isinstance(part, dict | set) and not part  # most are tables without hooks
        if name not in (*_TABLES, _COMPILED) and not empty:
            yield f"{path}.{name}", part


def attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, object), each object once, of all that hangs on the model: ``("model.trainer.lock", lock)``.

    It goes through modules, containers and the attributes of objects, not into functions.

    >>> [path for path, part in attributes(nn.Linear(2, 2)) if isinstance(part, Tensor)]
    ['model.weight', 'model.bias']
    """
    waiting: list[tuple[str, Any]] = [("model", model)]
    seen: set[int] = set()
    for path, value in waiting:  # it grows
        if not isinstance(value, _PLAIN) and id(value) not in seen:
            seen.add(id(value))
            yield path, value
            waiting.extend(_parts(path, value))


def uncopied(path: str, value: Any, memo: Mapping[int, Any], above: frozenset[int] = frozenset()) -> tuple[str, Any]:
    """The innermost part at which a deep copy of an object fails, and its path; no part of what copies itself."""
    if hasattr(value, "__deepcopy__"):
        return path, value
    above |= {id(value)}
    for part_path, part in _parts(path, value):
        if id(part) not in above:
            try:
                copy.deepcopy(part, dict(memo))
            except Exception:
                return uncopied(part_path, part, memo, above)
    return path, value


def _closure_cells(function: Any) -> Iterator[nn.Module | Tensor]:
    """Modules and tensors that a function or weak reference holds where a deep copy does not follow."""
    waiting, seen = [function], set()
    for value in waiting:  # it grows
        if id(value) in seen or isinstance(value, _PLAIN):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module | Tensor):
            yield value
        elif isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
            waiting += [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        elif isinstance(value, weakref.ref):
            waiting.append(value())
        elif isinstance(value, types.MethodType | functools.partial | dict | list | tuple | set):
            waiting += [part for _, part in _parts("", value)]


def _holders(model: nn.Module) -> Iterator[tuple[str, int]]:
    """(path, id of a module or tensor) for every function that holds it past the model."""
    for path, value in attributes(model):
        if isinstance(value, types.FunctionType | weakref.ref):
            yield from ((path, id(part)) for part in _closure_cells(value))


def held_past_the_model(model: nn.Module) -> dict[int, str]:
    """By id of a module or tensor, the path of a function that would keep the dense one after a replacement.

    That is a closure, a default or a weak reference, which a copy shares with the model, or a bound method of another
    class than the new layer's.
    """
    held = {key: path for path, key in _holders(model)}
    for path, value in attributes(model):
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            owner = value.__self__
            if not any(part is value for part in vars(owner).values()):
                held.setdefault(id(owner), path)
    return held


def warn_of_holders(model: nn.Module, replaced: Collection[str]) -> None:
    """UserWarning for an optimizer of replaced layers, a container of their weights, a function that holds a module of
    such layers.
    """
    layers = [model.get_submodule(name) for name in replaced]
    modules = {id(layer) for layer in layers}
    tensors = {id(p) for layer in layers for p in layer.parameters()}
    for path, value in attributes(model):
        held = [] if isinstance(value, nn.Module) or path.endswith(_TABLES) else [*_parts(path, value)]
        for part_path, part in held:
            if isinstance(part, Tensor) and id(part) in tensors:
                warnings.warn(
                    f"{part_path} holds a weight of a dense layer, which stays in the compressed model and is not used "
                    f"by its layers; set it anew there",
                    stacklevel=3,
                )
        groups = value.param_groups if isinstance(value, torch.optim.Optimizer) else []
        if any(id(p) in tensors for group in groups for p in group["params"]):
            warnings.warn(
                f"{path}: this optimizer trains weights of the dense layers; give the compressed model a new one",
                stacklevel=3,
            )
    above = {id(m): n for n, m in model.named_modules() if any(id(part) in modules for part in m.modules())}
    for path, key in _holders(model):
        if key in above:
            warnings.warn(
                f"{path}: this function holds {above[key] or 'the model'!r}, and would use its dense layers in the "
                f"compressed model too; set it anew there",
                stacklevel=3,
            )


def _in_plain_containers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of those in lists, dicts and the like that hang on modules, which torch does not see."""
    known = {id(module) for module in model.modules()}
    for owner, module in model.named_modules():
        held = [(name, part) for name, part in vars(module).items() if name not in _TABLES]
        waiting = [(f"{owner}.{name}".lstrip("."), part) for name, part in held if isinstance(part, _CONTAINERS)]
        for path, value in waiting:  # it grows
            if isinstance(value, nn.Module) and id(value) not in known:
                yield path, value
            elif isinstance(value, _CONTAINERS) and id(value) not in known:
                waiting.extend(_parts(path, value))
            known.add(id(value))


def warn_of_unregistered(model: nn.Module) -> None:
    """UserWarning for layers in plain lists and dicts: they are no parts of the model, and stay as they are."""
    paths = [p for p, m in _in_plain_containers(model) if any(weight_shape(part) is not None for part in m.modules())]
    if paths:
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        warnings.warn(
            f"layers in plain lists or dicts are no parts of the model for torch, and stay as they are: "
            f"{', '.join(paths[:3])}{more}; hold them in nn.ModuleList or nn.ModuleDict to have them compressed",
            stacklevel=3,
        )
