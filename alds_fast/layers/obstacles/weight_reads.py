"""Which forwards compute with the weight or bias of a child, instead of calling it, or ask for types: by the source."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

ANY = "*"  # an entry of a list of modules
_HARMLESS = {
    "dtype",
    "device",
    "shape",
    "ndim",
    "is_cuda",
    "requires_grad",
    "size",
    "dim",
    "numel",
    "is_floating_point",
}
_ASKING = {"isinstance", "hasattr", "type", "next"}  # next(layer.parameters()) is asked for its type
_TENSORS = {"weight", "parameters", "named_parameters", "get_parameter", "state_dict", "_parameters"}
_TENSORS |= {"in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"}  # of attention
_TYPES = {"Linear", *(f"Conv{kind}{axes}d" for kind in ("", "Transpose") for axes in (1, 2, 3))}
_FORWARDS = {"forward", "_conv_forward"}
_MOST = 16  # times that a function is read with other arguments: one that calls itself goes no further down

Attributes = tuple[str, ...]  # attributes from a module down to a child
Given = tuple[tuple[int | str, Attributes], ...]  # by position or name, which arguments are modules


class _Reads(ast.NodeVisitor):
    """Collects from one function the children whose weights are used, and what the module is asked for.

    ``names``: what its names stand for, below the module; ``calls``: functions that are given modules. ``asks`` says
    whether it asks if something is one of torch's layers.
    """

    def __init__(self, function: ast.FunctionDef | ast.Lambda, given: Given) -> None:
        self.weights: set[Attributes] = set()
        self.biases: set[Attributes] = set()
        self.asks = False
        self.methods: set[str] = set()
        self.inherited: set[str] = set()
        self.calls: list[tuple[str, Given]] = []
        self.names: dict[str, Attributes] = {}
        self._give(function, given)
        self.entered: list[ast.AST] = []
        inside = (node for node in ast.walk(function) if isinstance(node, ast.FunctionDef) and node is not function)
        self.inside = {node.name: node for node in inside}
        for statement in function.body if isinstance(function, ast.FunctionDef) else [function.body]:
            self.visit(statement)

    def chain(self, node: ast.AST) -> Attributes | None:
        """Where an expression is below the module; None for anything else."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute | ast.Subscript):
            above = self.chain(node.value)
            return None if above is None else (*above, node.attr if isinstance(node, ast.Attribute) else _entry(node))
        if isinstance(node, ast.Call) and _name_of(node) == "getattr":
            above, name = self.chain(node.args[0]), _constant(node.args[1])
            return None if above is None or name is None else (*above, name)
        method = node.func if isinstance(node, ast.Call) else None
        if isinstance(method, ast.Attribute) and method.attr in ("values", "items"):
            return self.chain(method.value) or None
        return None

    def _give(self, function: ast.FunctionDef | ast.Lambda, given: Given) -> None:
        arguments = [argument.arg for argument in function.args.args]
        for key, where in given:
            if isinstance(key, str) or key < len(arguments):
                self.names[key if isinstance(key, str) else arguments[key]] = where

    def visit_Assign(self, node: ast.Assign) -> None:
        """A name for a child."""
        self.visit(node.value)
        where = self.chain(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name) and where is not None:
                self.names[target.id] = where

    def _loop(self, node: ast.For | ast.comprehension) -> None:
        """A name for the children of a list."""
        parts = [node.iter]
        if isinstance(node.iter, ast.Call) and _name_of(node.iter) in ("enumerate", "zip", "reversed", "list"):
            parts = node.iter.args
        targets = node.target.elts if isinstance(node.target, ast.Tuple) else [node.target]
        for where in filter(None, map(self.chain, parts)):
            self.names |= {target.id: (*where, ANY) for target in targets if isinstance(target, ast.Name)}
        self.generic_visit(node)

    visit_For = visit_comprehension = _loop

    def visit_GeneratorExp(self, node: ast.GeneratorExp | ast.ListComp) -> None:
        """Names first, then what is done with them."""
        for part in (*node.generators, node.elt):
            self.visit(part)

    visit_ListComp = visit_GeneratorExp

    def visit_Call(self, node: ast.Call) -> None:
        """Nothing in a question about the weight; a function that is given children."""
        name = _name_of(node)
        if name in _ASKING:
            kinds = {n.attr if isinstance(n, ast.Attribute) else getattr(n, "id", "") for n in ast.walk(node)}
            self.asks |= name == "isinstance" and bool(kinds & _TYPES)
            return  # what it asks is not the weight's values
        if name == "getattr" and _constant(node.args[1]) in _TENSORS and (where := self.chain(node.args[0])):
            self.weights.add(where)
        arguments: dict[int | str, ast.AST] = dict(enumerate(node.args))
        arguments |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        given = tuple((k, where) for k, part in arguments.items() if (where := self.chain(part)) is not None)
        called = self.inside.get(name) if name else node.func
        if isinstance(node.func, ast.Attribute) and node.func.attr in _FORWARDS and self.chain(node.func) is None:
            self.weights |= {where for key, where in given if key == 0 and where}  # nn.Linear.forward(self.child, x)
        if isinstance(called, ast.FunctionDef | ast.Lambda):
            if called not in self.entered:  # one that calls itself
                self._give(called, given)
                self.entered.append(called)
                self.visit(called)
                self.entered.pop()
        elif name and given:
            self.calls.append((name, given))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """A weight that is used, or a method or property of the module."""
        inner = node.value
        if node.attr in _HARMLESS and isinstance(inner, ast.Attribute) and inner.attr == "weight":
            return
        where = self.chain(inner)
        if _name_of(inner) == "super":
            self.inherited.add(node.attr)
        elif where == ():
            self.methods.add(node.attr)
        elif where is not None and node.attr in _TENSORS:
            self.weights.add(where)
        elif where is not None and node.attr == "bias":
            self.biases.add(where)
        self.generic_visit(node)


def _name_of(node: ast.AST) -> str:
    """The name of the function that is called; empty for anything else."""
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _constant(node: ast.AST) -> str | None:
    return str(node.value) if isinstance(node, ast.Constant) else None


def _entry(node: ast.Subscript) -> str:
    """The key of an entry where it is a constant that names a child, of a list counted from its begin."""
    key = _constant(node.slice)
    return ANY if key is None or key.startswith("-") else key


def _source(function: Any) -> ast.FunctionDef | ast.Lambda | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):  # made at run time, or compiled: its source is not there
        return None
    return next((n for n in tree.body if isinstance(n, ast.FunctionDef)), None)


def _functions(attribute: Any) -> Iterator[FunctionType]:
    """The Python functions behind a method, property, or decorated function of a model; none of torch's."""
    for name in ("__func__", "fget", "func"):  # of static methods, properties and cached properties
        attribute = getattr(attribute, name, attribute)
    function = inspect.unwrap(attribute) if callable(attribute) else None
    if isinstance(function, FunctionType) and not str(function.__module__).startswith("torch."):
        yield function
        for cell in function.__closure__ or ():  # what a decorator without functools.wraps holds
            with_function = getattr(cell, "cell_contents", None) if cell != type(cell)() else None
            if isinstance(with_function, FunctionType) and with_function is not function:
                yield from _functions(with_function)


def _inherited(kind: type, function: FunctionType, name: str) -> Any:
    """What ``super().name`` is in a method of the class."""
    owners = [i for i, cls in enumerate(kind.__mro__) if function in vars(cls).values()]
    above = kind.__mro__[owners[0] + 1 :] if owners else ()
    return next((vars(cls)[name] for cls in above if name in vars(cls)), None)


class _Read(NamedTuple):
    """Of a class, the children by their attributes whose weights and biases are used, and whether it asks for types."""

    weights: frozenset[Attributes]
    biases: frozenset[Attributes]
    asks: bool


@functools.cache
def _read_by(kind: type) -> _Read:
    """What the forward of a class, and what that calls, use and ask."""
    itself: Given = ((0, ()),)
    waiting: list[tuple[Any, Given]] = [(inspect.getattr_static(kind, "forward", None), itself)]
    seen: dict[FunctionType, set[Given]] = {}
    weights, biases, asks = set(), set(), False
    for attribute, given in waiting:  # it grows
        for function in _functions(attribute):
            read = seen.setdefault(function, set())
            source = None if given in read or len(read) == _MOST else _source(function)
            read.add(given)
            if source is None:
                continue
            reads = _Reads(source, given)
            weights |= reads.weights
            biases |= reads.biases
            asks |= reads.asks
            waiting += [(inspect.getattr_static(kind, name, None), itself) for name in reads.methods]
            waiting += [(_inherited(kind, function, name), itself) for name in reads.inherited]
            waiting += [(function.__globals__.get(name), given_there) for name, given_there in reads.calls]
    return _Read(frozenset(weights), frozenset(biases), asks)


def _fits(chain: Attributes, path: Sequence[str]) -> bool:
    return len(chain) == len(path) and all(a in (ANY, b) for a, b in zip(chain, path, strict=True))


def _of_torch(kind: Any) -> bool:
    return str(kind.__module__).startswith("torch.")


def readers(ancestors: Sequence[tuple[nn.Module, str]], of: str = "weights") -> Iterator[str]:
    """The classes of those of a layer's ancestors, from the model down, whose forwards use its weight themselves.

    Or its bias, for ``of`` "biases".
    """
    path = [name for _, names in ancestors for name in names.split(".")]
    for depth, (module, _) in enumerate(ancestors):
        kind: Any = type(module)
        if not _of_torch(kind) and any(_fits(chain, path[depth:]) for chain in getattr(_read_by(kind), of)):
            yield kind.__name__


def warn_of_questions(model: nn.Module) -> None:
    """UserWarning for forwards that ask whether something is a Linear or convolution: they may go another way then."""
    kinds = {type(m): None for m in model.modules() if not _of_torch(type(m)) and type(m).__module__[:5] != "peft."}
    asking = [kind.__name__ for kind in kinds if _read_by(kind).asks]  # type: ignore[arg-type]
    if asking:
        warnings.warn(
            f"the forward of {asking[0]} asks whether something is one of torch's layers, which low-rank layers are "
            f"not; with example_inputs= or data= the result is compared with the dense model, without neither is",
            stacklevel=4,
        )
