"""Which layers take the channels of which others, one by one, in a run: what may stand in another order in between.

Every tensor that a layer returns is followed through functions that treat all its channels alike: activations, sums and
products with one another, BatchNorm, pooling, dropout. Layers whose channels meet in one tensor form a group. A group
is free if nothing but layers sees its channels; everything that is not known to be harmless takes a group's freedom.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..layers import LowRankLayer, attributes, has_hooks, label
from ..measurement import as_written, check_runs, first_input, leaves_of, private_runs

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, LowRankLayer)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_EACH = {  # functions of every number by itself, or of numbers of one channel
    "relu", "relu_", "relu6", "gelu", "silu", "sigmoid", "tanh", "elu", "leaky_relu", "leaky_relu_", "hardtanh",
    "hardswish", "hardsigmoid", "mish", "softplus", "selu", "celu", "logsigmoid", "square", "exp", "abs", "neg", "sqrt",
    "dropout", "dropout1d", "dropout2d", "dropout3d", "clamp", "clamp_min", "pow", "__pow__", "contiguous", "clone",
    "detach", "to", "float", "half", "bfloat16", "double", "add", "add_", "__add__", "__radd__", "__iadd__", "sub",
    "__sub__", "__rsub__", "mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "__truediv__",
}  # fmt: skip
_POOLS = {
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d",
}  # fmt: skip
_SHAPES = {"flatten", "view", "reshape", "squeeze", "mean"}
_QUESTIONS = {
    "shape", "size", "dim", "ndim", "numel", "dtype", "device", "is_cuda", "requires_grad", "is_floating_point",
    "is_contiguous", "stride", "layout", "is_sparse", "is_quantized", "is_nested", "names", "data_ptr", "__len__",
}  # fmt: skip


@dataclass
class Group:
    """Layers whose channels meet (``makers``), norms that every channel goes through, and layers that read them."""

    makers: set[str] = field(default_factory=set)
    norms: set[str] = field(default_factory=set)
    takers: set[str] = field(default_factory=set)
    free: bool = True


class _Flow(TorchFunctionMode):
    """Follows tensors by their identity: the group that they belong to, and which dimension its channels are."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[Tensor, int, int]] = {}  # the tensor, so that it stays; group; dimension
        self.groups: list[Group] = []
        self.joined: list[int] = []  # by group the one that it is now a part of
        self.of_layer: dict[str, int] = {}
        self.called: set[str] = set()
        self.unknown: set[str] = set()  # layers that take tensors of no group
        self.inside = 0

    def root(self, group: int) -> int:
        """The group that this one is a part of."""
        while self.joined[group] != group:
            group = self.joined[group]
        return group

    def new(self, name: str) -> int:
        """The group of what a layer makes."""
        if name not in self.of_layer:
            self.of_layer[name] = len(self.groups)
            self.groups.append(Group({name}))
            self.joined.append(len(self.joined))
        return self.root(self.of_layer[name])

    def join(self, one: int, other: int) -> int:
        """Two groups become one."""
        one, other = self.root(one), self.root(other)
        if one != other:
            a, b = self.groups[one], self.groups[other]
            self.groups[one] = Group(a.makers | b.makers, a.norms | b.norms, a.takers | b.takers, a.free and b.free)
            self.joined[other] = one
        return one

    def tag(self, tensor: Any, group: int, dim: int) -> None:
        """From now on the tensor is known."""
        if isinstance(tensor, Tensor):
            self.known[id(tensor)] = tensor, group, dim

    def tags(self, values: Any) -> list[tuple[Tensor, int, int]]:
        """What is known of the tensors in these values."""
        return [self.known[id(t)] for t in tree_leaves(values) if isinstance(t, Tensor) and id(t) in self.known]

    def bind(self, values: Any) -> None:
        """These tensors are seen by something that is not known: their channels stay where they are."""
        for _, group, _ in self.tags(values):
            self.groups[self.root(group)].free = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        tags = self.tags([args, kwargs])
        self.inside += bool(tags)  # what a function calls in its turn is a part of it
        try:
            result = func(*args, **kwargs)
        finally:
            self.inside -= bool(tags)
        if tags:
            self._follow(func, args, kwargs, tags, result)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, tags: list[tuple[Tensor, int, int]], result: Any) -> None:
        owner = getattr(func, "__self__", None)  # that of an attribute's getter
        name = str(getattr(owner if func.__name__ == "__get__" else func, "__name__", ""))
        if name in _QUESTIONS:
            return
        dim = _dim_after(name, args, kwargs, tags, result)
        if dim is None:
            self.bind([args, kwargs])
            return
        group = tags[0][1]
        for _, other, _ in tags[1:]:
            group = self.join(group, other)
        self.tag(result, group, dim)


def _dim_after(name: str, args: Any, kwargs: Any, tags: list[tuple[Tensor, int, int]], result: Any) -> int | None:
    """Which dimension of the result the channels are; None where they do not pass one by one."""
    x, _, dim = tags[0]
    if not isinstance(result, Tensor):
        return None
    if name in _EACH:
        others = [t for t in tree_leaves([args, kwargs]) if isinstance(t, Tensor) and all(t is not k[0] for k in tags)]
        alike = all((t.dim(), at, t.shape[at]) == (result.dim(), dim, result.shape[dim]) for t, _, at in tags)
        return dim if alike and all(t.numel() == 1 for t in others) else None
    if name in _POOLS:
        behind = x.dim() - 1 - dim  # as many dimensions as the pool has, or it takes channels for one of them
        alike = result.dim() == x.dim() and result.shape[dim] == x.shape[dim]
        return dim if alike and behind == int(name[-2]) else None
    if name in _SHAPES:
        return _dim_of_shape(name, args, kwargs, x, dim, result)
    return None


def _dim_of_shape(name: str, args: Any, kwargs: Any, x: Tensor, dim: int, result: Tensor) -> int | None:
    """Of a mean over all dimensions behind the channels, or of a view that keeps them as its last dimension."""
    behind = list(range(dim + 1, x.dim()))
    if name == "mean":
        over = kwargs.get("dim", args[1] if len(args) > 1 else None)
        over = [over] if isinstance(over, int) else [] if over is None else list(over)
        whole = bool(behind) and sorted(d % x.dim() for d in over) == behind
        return dim if whole and result.shape[dim] == x.shape[dim] else None
    last = all(x.shape[d] == 1 for d in behind) and result.dim() and result.shape[-1] == x.shape[dim]
    return result.dim() - 1 if last else None


def _dim_of_layer(layer: nn.Module, x: Tensor) -> int:
    """Which dimension of a layer's input, or output, are its channels."""
    size = getattr(layer, "kernel_size", None)
    return x.dim() - 1 - (len(size) if isinstance(size, tuple) else 0)


@contextmanager
def _watched(modules: Mapping[str, nn.Module], flow: _Flow) -> Iterator[None]:
    """Layers and norms tell what they take and make; what they do in between is not looked at."""

    def watched(name: str, module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            flow.called.add(name)
            x = first_input(args, kwargs)
            tags = flow.tags([x])
            flow.bind([args[1:], {k: v for k, v in kwargs.items() if v is not x}])
            flow.inside += 1
            try:
                y = forward(*args, **kwargs)
            finally:
                flow.inside -= 1
            _pass(name, module, x, y, tags, flow)
            return y

        return call

    before = {name: vars(module).get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            vars(module)["forward"] = watched(name, module)
        yield
    finally:
        for name, module in modules.items():
            vars(module).pop("forward")
            vars(module).update({} if before[name] is None else {"forward": before[name]})


def _pass(name: str, module: nn.Module, x: Any, y: Any, tags: list[tuple[Tensor, int, int]], flow: _Flow) -> None:
    """Note one call of a layer or norm."""
    if isinstance(module, BATCH_NORMS):
        for _, group, dim in tags:
            flow.groups[flow.root(group)].norms.add(name)
            if dim == 1:
                flow.tag(y, group, dim)
            else:
                flow.bind([x])
        if not tags:
            flow.unknown.add(name)
        return
    for _, group, dim in tags:
        flow.groups[flow.root(group)].takers.add(name)
        if dim != _dim_of_layer(module, x):
            flow.bind([x])
    if not tags:
        flow.unknown.add(name)
    flow.tag(y, flow.new(name), _dim_of_layer(module, y))


def _why_not_followed(model: nn.Module, called: Set[int]) -> str | None:
    """What keeps channels from being followed in the whole model; None for nothing."""
    own = {id(child) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for child in m.children()}
    for name, module in model.named_modules():
        if has_hooks(module):
            return f"{label(name)} has hooks, which may read them"
        if isinstance(module, (*LAYERS, *BATCH_NORMS)) and id(module) not in called | own:
            return f"{label(name)} is not called with the example inputs, so that what it takes is not known"
    return None


def channel_groups(model: nn.Module, example_inputs: Any) -> list[Group]:
    """The groups of a run of the model that are free; the model is left as it was.

    A layer that is in two groups, or that also takes tensors that are not known, frees neither. None are free, with a
    warning, in a model with hooks or with layers that the run does not call.
    """
    modules = dict(model.named_modules())
    watched = {name: m for name, m in modules.items() if isinstance(m, (*LAYERS, *BATCH_NORMS))}
    flow = _Flow()
    try:
        with _watched(watched, flow), as_written(), private_runs(model) as run, flow:
            flow.bind(list(leaves_of(run(example_inputs, 0, "example_inputs"))))
            flow.bind([value for _, value in attributes(model) if isinstance(value, Tensor)])  # what it keeps
    except Exception as e:
        check_runs(model, example_inputs, "example_inputs")
        warnings.warn(f"the model's channels could not be followed ({type(e).__name__}: {e})", stacklevel=4)
        return []
    if (reason := _why_not_followed(model, {id(watched[name]) for name in flow.called})) is not None:
        warnings.warn(f"channels stay in the order of the outputs: {reason}", stacklevel=4)
        return []
    groups = [group for i, group in enumerate(flow.groups) if flow.root(i) == i]
    for group in groups:
        for other in groups:
            shared = group is not other and (group.takers & other.takers or group.norms & other.norms)
            group.free &= not shared
        group.free &= not (group.takers | group.norms) & flow.unknown
    return [group for group in groups if group.free and group.takers]
