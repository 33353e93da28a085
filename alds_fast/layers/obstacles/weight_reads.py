"""Which forwards compute with the weight of a child that they hold, instead of calling it, by their source."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

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
_ASKING = {"isinstance", "hasattr", "type"}

Attributes = tuple[str, ...]  # attributes from a module down to a child


class _Reads(ast.NodeVisitor):
    """Collects from one function the children whose ``weight`` is used, and the methods of the module."""

    def __init__(self, function: ast.FunctionDef) -> None:
        self.weights: set[Attributes] = set()
        self.methods: set[str] = set()
        self.names: dict[str, Attributes] = {function.args.args[0].arg: ()} if function.args.args else {}
        for statement in function.body:
            self.visit(statement)

    def chain(self, node: ast.AST) -> Attributes | None:
        """Where an expression is below the module; None for anything else."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute | ast.Subscript):
            above = self.chain(node.value)
            return None if above is None else (*above, node.attr if isinstance(node, ast.Attribute) else ANY)
        return None

    def visit_Assign(self, node: ast.Assign) -> None:
        """A name for a child."""
        self.visit(node.value)
        where = self.chain(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name) and where is not None:
                self.names[target.id] = where

    def visit_For(self, node: ast.For) -> None:
        """A name for the children of a list."""
        where = self.chain(node.iter)
        if isinstance(node.target, ast.Name) and where is not None:
            self.names[node.target.id] = (*where, ANY)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Nothing in a question about the weight."""
        if isinstance(node.func, ast.Name) and node.func.id in _ASKING:
            return  # what it asks is not the weight's values
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """A weight that is used, or a method of the module."""
        inner = node.value
        if node.attr in _HARMLESS and isinstance(inner, ast.Attribute) and inner.attr == "weight":
            return
        where = self.chain(node.value)
        if where == ():
            self.methods.add(node.attr)
        elif where is not None and node.attr == "weight":
            self.weights.add(where)
        self.generic_visit(node)


def _source(function: Any) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError, ValueError):  # made at run time, or compiled: its source is not there
        return None
    return next((n for n in tree.body if isinstance(n, ast.FunctionDef)), None)


@functools.cache
def _weights_read_by(kind: type) -> frozenset[Attributes]:
    """Children, by their attributes, whose weights the forward of a class and the methods that it calls use."""
    waiting, seen, weights = ["forward"], set(), set()
    while waiting:
        name = waiting.pop()
        function = inspect.getattr_static(kind, name, None)
        function = getattr(function, "__func__", function)
        if name in seen or not inspect.isfunction(function) or str(function.__module__).startswith("torch."):
            continue
        seen.add(name)
        source = _source(function)
        if source is not None:
            reads = _Reads(source)
            weights |= reads.weights
            waiting += reads.methods
    return frozenset(weights)


def _fits(chain: Attributes, path: Sequence[str]) -> bool:
    return len(chain) == len(path) and all(a in (ANY, b) for a, b in zip(chain, path, strict=True))


def readers(ancestors: Sequence[tuple[nn.Module, str]]) -> Iterator[str]:
    """The classes of those of a layer's ancestors, from the model down, whose forwards use its weight themselves."""
    path = [name for _, names in ancestors for name in names.split(".")]
    for depth, (module, _) in enumerate(ancestors):
        kind: Any = type(module)
        of_torch = str(kind.__module__).startswith("torch.")
        if not of_torch and any(_fits(chain, path[depth:]) for chain in _weights_read_by(kind)):
            yield kind.__name__
