"""Runs of a user's model that leave no trace and do not depend on one another.

Every run gets its own copy of the batch, begins in the same state of the model and, for batches of the same number, of
the random numbers. At the end the model and the random numbers are as they were.
"""

from __future__ import annotations

import copy
import operator
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import AldsError, ModelError
from ..layers import LowRankLayer, has_plain_memory, is_freed, is_narrowed
from .run_model import call_model, inference, without_nested_tensors

Run = Callable[..., Any]  # (batch, number, name) -> the model's output
_SEED = 0x5EED
MAPPED = "alds_mapped"  # set on a model whose parameters lie in files: none of them is copied
_LARGE = 2**20  # numbers of a parameter that are not copied, and of a tensor that are not compared
_LOOKED = 3  # times that parameters are compared
_DEPTH = 2  # of objects in objects: beyond, a trainer that hangs on a model leads to its data
_OWN = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules", "training"} | {"forward"}  # which others set


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    try:
        return copy.deepcopy(value)  # a cache, say, that the model would fill
    except Exception:
        pass
    try:  # its parts, one by one: what cannot be copied (a lock, an open file) holds no values to compute with
        shallow = copy.copy(value)
        for name, part in vars(shallow).items():
            vars(shallow)[name] = copy_batch(part)
        return shallow
    except Exception:
        return value


def copy_batch(batch: Any) -> Any:
    """The batch with tensors of its own, detached, and whatever else it carries copied too."""
    with torch.inference_mode(False):  # or they would be inference tensors, which a model need not take
        return tree_map(_copy, batch)


def _content(value: Any) -> Any:
    """What a list, deque, set, dict or object holds, to be read and written; None for anything else."""
    if isinstance(value, list | deque | set | dict):
        return value
    skipped = isinstance(value, Tensor | type | ModuleType | FunctionType) or not hasattr(value, "__dict__")
    return None if skipped else vars(value)


def _values(content: Any) -> list[Any]:
    return [value for name, value in content.items() if name not in _OWN] if isinstance(content, dict) else [*content]


def _undo(value: Any) -> Callable[[], object] | None:
    """What puts a random generator, or an array of numpy, back to what it is; None for anything else."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return partial(np.copyto, value, value.copy()) if isinstance(value, np.ndarray) and value.flags.writeable else None


def _is_changed(tensor: Tensor, old: Tensor) -> bool:
    """Whether it was written past its version counter, as through ``.data`` or numpy; large ones are not looked at."""
    if tensor.shape != old.shape or tensor.numel() > _LARGE or torch.equal(tensor, old):
        return False
    return not bool(((tensor == old) | ((tensor != tensor) & (old != old))).all())  # NaN is NaN


class _State:
    """What a model's modules, and the objects in them, hold, to be put back."""

    def __init__(self, model: nn.Module, changing: Iterable[Tensor] = ()) -> None:
        self.contents: list[tuple[Any, Any]] = []
        self.tensors: list[tuple[Tensor, int, Tensor | None]] = []  # without a copy where that would be large
        self.others: list[Callable[[], object]] = []  # what puts back random generators and arrays of numpy
        self.restored, self.changing = 0, set[int]()
        self.mapped = getattr(model, MAPPED, False)
        modules = list(model.modules())
        fitted = [m for m in modules if isinstance(m, LowRankLayer) or is_narrowed(m)]  # changed by refit between runs
        self.written = {id(m.weight) for m in modules if getattr(m, "max_norm", None) is not None}  # by embeddings
        self.ours = {id(t) for m in fitted for t in (*m._parameters.values(), *m._buffers.values())}
        self.ours |= set(map(id, changing))
        seen = {id(module) for module in modules}  # none as a part of another, where it would be too deep
        for module in modules:
            seen.discard(id(module))
            self._keep(module, 0, seen)

    def _keep(self, value: Any, depth: int, seen: set[int]) -> None:
        if depth > _DEPTH or id(value) in seen:
            return
        seen.add(id(value))
        if (undo := _undo(value)) is not None:
            self.others.append(undo)
            return
        if isinstance(value, Tensor):
            if not (
                id(value) in self.ours
                or value.is_meta
                or value.is_inference()
                or not has_plain_memory(value)
                or is_freed(value)
            ):
                parameter = isinstance(value, nn.Parameter) and id(value) not in self.written
                large = parameter and (value.numel() > _LARGE or self.mapped)
                self.tensors.append((value, value._version, None if large else value.detach().clone()))
            return
        content = value if isinstance(value, tuple) else _content(value)
        if content is None:
            return
        if not isinstance(content, tuple):
            self.contents.append((content, dict(content) if isinstance(content, dict) else list(content)))
        for part in _values(content):
            self._keep(part, depth + 1, seen)

    def _looked_at(self, i: int) -> bool:
        """Whether a tensor's values are compared: parameters that no run has written to, only at first."""
        return self.restored <= _LOOKED or i in self.changing or not isinstance(self.tensors[i][0], nn.Parameter)

    def restore(self) -> None:
        """Put everything back."""
        for content, kept in self.contents:
            if isinstance(content, dict):
                _refill(content, kept)
            elif len(content) != len(kept) or any(a is not b for a, b in zip(content, kept, strict=True)):
                content.clear()
                (content.update if isinstance(content, set) else content.extend)(kept)
        self.restored += 1

        with torch.no_grad():
            for i, (tensor, version, old) in enumerate(self.tensors):
                if old is None and tensor._version != version:
                    raise ModelError(
                        f"the model changes a parameter of shape {tuple(tensor.shape)} in its forward, too large to be "
                        f"put back, so that it is changed now; keep it in a buffer, or freeze it in evaluation mode"
                    )
                if old is not None and (
                    tensor._version != version or (self._looked_at(i) and _is_changed(tensor, old))
                ):
                    self.changing.add(i)
                    tensor.detach().copy_(old)
                    self.tensors[i] = tensor, tensor._version, old
        for undo in self.others:
            undo()


def _refill(content: dict[Any, Any], kept: dict[Any, Any]) -> None:
    """The entries as they were, in their order; hooks and the like, which others set, as they are."""
    try:
        if (
            content == kept
        ):  # by identity where that serves: four times as fast as that alone, of every module in every run
            return
    except Exception:  # tensors and arrays that are others than before have no one truth
        pass
    if content.keys() == kept.keys() and all(map(operator.is_, content.values(), kept.values())):
        return
    mine, others = ({k: v for k, v in content.items() if (k in _OWN) == own} for own in (False, True))
    before = {k: v for k, v in kept.items() if k not in _OWN}
    if list(mine) != list(before) or any(mine[key] is not before[key] for key in before):
        content.clear()
        content.update({**others, **before})


@contextmanager
def keeping_random_state(model: nn.Module) -> Iterator[None]:
    """Torch's, numpy's and Python's random numbers go on as if nothing had been drawn."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def keeping_state(model: nn.Module, changing: Iterable[Tensor] = ()) -> Iterator[Callable[[], None]]:
    """What the model holds, and all random numbers, are put back at the end; gives what puts back the former."""
    with keeping_random_state(model):
        state = _State(model, changing)
        try:
            yield state.restore
        finally:
            state.restore()


@contextmanager
def private_runs(model: nn.Module, changing: Iterable[Tensor] = ()) -> Iterator[Run]:
    """Runs in evaluation mode, without gradients, each as if it were the only one.

    Gives ``run(batch, number, name)``: the model's output for a copy of the batch; ``name`` is what errors call it, and
    runs of one ``number`` draw the same random numbers, also those of other models. ``changing``: tensors that the
    caller changes between two runs, as those of low-rank layers may be.
    """
    with inference(model), without_nested_tensors(model), keeping_state(model, changing) as restore:

        def run(batch: Any, number: int, name: str) -> Any:
            restore()
            random.seed(_SEED + number)
            np.random.seed(_SEED + number)
            torch.manual_seed(_SEED + number)
            torch.clear_autocast_cache()  # of weights that the caller has changed since
            return call_model(model, copy_batch(batch), name)

        yield run


def check_runs(model: nn.Module, inputs: Any, name: str) -> Any:
    """The model's output; ModelError if it does not run, ArgumentError for what are no inputs."""
    try:
        with private_runs(model) as run:
            return run(inputs, 0, name)
    except AldsError:
        raise
    except Exception as e:
        words = "pass what model(...) takes, without labels; of a pair (x, y) x alone"
        if isinstance(e, IndexError) and "out of range" in str(e):  # of a table, as torch says it on a CPU
            words = "are there tokens beyond the vocabulary, or more of them than positions?"
        elif isinstance(inputs, Mapping):
            words += "; a dict holds keyword arguments: one that model(...) takes itself goes into a tuple, ({...},)"
        raise ModelError(f"{name} did not run through the model ({type(e).__name__}: {e}); {words}") from e
