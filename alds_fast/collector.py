"""Hooks that sum up what layers see, call after call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .discover import Layer, label
from .errors import ModelError
from .patches import Wanted, masked, outputs, patches

LEAST_SHARE = 1 / 64  # of a convolution's patches, even where their product then costs more than the layer
ENOUGH_ROWS = 512  # a call
BLOCKS = 4  # of a symmetric product's columns, of which one triangle is computed
MIRRORED = 256  # columns at once


@dataclass(frozen=True)
class Moments:
    """What a layer sees: float64, on the CPU; x is a token or an im2col patch, y = W x without the bias.

    Attributes:
        rows: number of x seen.
        second: E[x x^T], (conv_groups, n, n), n = channels * kernel area of a convolution's group; None for a layer
            whose n is above the limit, where ``output`` serves.
        mean: E[x], (conv_groups, n), or, beside ``output``, E[y], (conv_groups, filters of a group).
        output: E[y y^T], (conv_groups, filters of a group, the same), or None.
        gradient: sum over all rows of g g^T over the sum of the squares of the network's output, g the gradient at y
            of that output's product with random signs; shaped as ``output``; zero where that output does not depend
            on the layer, None if not asked for.
    """

    rows: int
    second: Tensor | None
    mean: Tensor
    output: Tensor | None = None
    gradient: Tensor | None = None


@dataclass(frozen=True)
class _Product:
    """Of some rows x: the upper triangle of the sum of x x^T (groups, n, n) as strips from the diagonal on, each with
    its rows, the sum of x (groups, n) in float64, and how many rows there were."""

    strips: Iterable[tuple[slice, Tensor]]
    mean: Tensor
    used: int


@contextmanager
def exact_products() -> Iterator[None]:
    """No tf32 or bfloat16 inside float32 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _strips(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    width = x.shape[-1]
    step = -(-width // (BLOCKS if width >= 64 else 1))
    for start in range(0, width, step):
        with exact_products():
            strip = x[:, :, start : start + step].mT @ x[:, :, start:]
        yield slice(start, start + step), strip


def _product(rows: Tensor) -> _Product:
    """Products in float64 for float64 rows (rows, groups, n), in float32 otherwise, made as they are added."""
    x = rows.detach().transpose(0, 1)
    x = x if x.dtype == torch.float64 else x.float()
    return _Product(_strips(x), x.sum(1, dtype=torch.float64), len(rows))


class _Sum:
    """Float64 sums of the products of all batches, each scaled up to all the rows that it was drawn from."""

    def __init__(self) -> None:
        self.rows = 0
        self.second: Tensor | None = None
        self.mean: Tensor | None = None

    def add(self, product: _Product, rows: int) -> None:
        """Add a product of some of a call's ``rows``, scaled up to all of them."""
        if self.second is None or self.mean is None:
            self.mean = torch.zeros_like(product.mean)
            self.second = self.mean.new_zeros(*self.mean.shape, self.mean.shape[-1])
        scale = rows / product.used if product.used else 0.0
        for block, strip in product.strips:
            self.second[:, block, block.start :].add_(strip, alpha=scale)
        self.mean.add_(product.mean, alpha=scale)
        self.rows += rows

    def over(self, count: float) -> tuple[Tensor, Tensor]:
        """The sums over ``count``, on the CPU; the sums are given up."""
        assert self.second is not None and self.mean is not None
        second, mean = self.second.div_(count), self.mean / count
        self.second = self.mean = None
        for start in range(0, second.shape[-1], MIRRORED):
            block, rest = slice(start, start + MIRRORED), slice(start + MIRRORED, None)
            square = second[:, block, block].triu()
            second[:, block, block] = square + square.triu(1).mT
            second[:, rest, block] = second[:, block, rest].mT
        return second.cpu(), mean.cpu()


class Collector:
    """Hooks on the layers, and what they have summed up."""

    def __init__(self, layers: Sequence[Layer], order: int, gradients: bool) -> None:
        self.layers, self.gradients = layers, gradients
        self.keep: Tensor | None = None
        self.sums: dict[str, _Sum] = {layer.name: _Sum() for layer in layers}
        self.gradient_sums: dict[str, _Sum] = {layer.name: _Sum() for layer in layers if gradients}
        self.by_output = {layer.name for layer in layers if columns_of(layer) > order}
        self.energy, self.seed = 0.0, 0
        self.last: tuple[Any, ...] = (lambda: None, None, None, 0)
        self.leaders: dict[str, set[str]] = {layer.name: set() for layer in layers}
        self.last_name = ""
        self.back = False  # in a backward pass, where checkpointed layers are called again: inputs do not count

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """With the hooks on the layers."""
        handles = []
        for layer in self.layers:
            if layer.name not in self.by_output:
                handles.append(layer.module.register_forward_pre_hook(self._on_input(layer), with_kwargs=True))
            if self.gradients or layer.name in self.by_output:
                handles.append(layer.module.register_forward_hook(self._on_output(layer)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_input(self, layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.back:
                self._add_input(layer, args[0] if args else kwargs["input"])

        return hook

    def _add_input(self, layer: Layer, x: Tensor) -> None:
        key = (*_geometry(layer), None if x.is_inference() else x._version)
        seen, known, product, rows = self.last
        if layer.kind == "Linear" and seen() is x and known == key:  # q, k and v read one tensor
            self.leaders[layer.name].add(self.last_name)
        else:
            keep = masked(layer.module, x, self.keep)
            found, rows = patches(layer.module, x.detach(), keep, rows_wanted(layer), self.seed)
            product = _product(found)
            if layer.kind == "Linear":  # convolutions rarely share an input, and their strips may be large
                product = replace(product, strips=list(product.strips))
                self.last, self.last_name = (weakref.ref(x), key, product, rows), layer.name
            self.seed += 1
            self.leaders[layer.name].add(layer.name)
        self.sums[layer.name].add(product, rows)

    def _on_output(self, layer: Layer) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
            if layer.name in self.by_output and not self.back:
                self._add_output(layer, y.detach())
            if not self.gradients or not torch.is_grad_enabled():  # or it runs where no gradient can matter
                return None
            if not y.requires_grad:  # nothing before it does: the gradient starts here
                y = y.detach().requires_grad_().clone()
            y.register_hook(lambda g: self._add_gradient(layer, g))
            return y

        return hook

    def _add_output(self, layer: Layer, y: Tensor) -> None:
        found, rows = outputs(layer.module, y, masked(layer.module, y, self.keep))
        bias: Any = layer.module.bias
        shift = 0.0 if bias is None else bias.detach().view(found.shape[1:])
        self.sums[layer.name].add(_product(found - shift), rows)

    def _add_gradient(self, layer: Layer, g: Tensor) -> None:
        wanted = _wanted(layer, filters_of(layer), columns_of(layer))
        found, rows = outputs(layer.module, g.detach(), masked(layer.module, g, self.keep), wanted, self.seed)
        self.seed += 1
        self.gradient_sums[layer.name].add(_product(found), rows)

    def moments(self) -> dict[str, Moments]:
        """By name, for the layers that were called; layers with one and the same input share its moment."""
        found: dict[str, Moments] = {}
        for layer in self.layers:
            own, gradient = self.sums[layer.name], None
            if not own.rows:
                continue
            if self.gradients and self.gradient_sums[layer.name].rows:
                gradient, _ = self.gradient_sums[layer.name].over(self.energy)
            elif self.gradients:  # what matters does not depend on this layer
                assert layer.shape is not None
                gradient = torch.zeros(layer.shape.conv_groups, *2 * [filters_of(layer)], dtype=torch.float64)
            rows, (second, mean) = own.rows, own.over(own.rows)
            for other in self.leaders[layer.name] & found.keys():
                shared = found[other].second
                if shared is not None and torch.equal(shared, second):
                    second = shared
            _check(layer, second, gradient)
            by_output = layer.name in self.by_output
            found[layer.name] = Moments(
                rows, None if by_output else second, mean, second if by_output else None, gradient
            )
        return found


def columns_of(layer: Layer) -> int:
    """Columns of the encode fold."""
    assert layer.shape is not None
    return layer.shape.numel // layer.shape.out_channels


def filters_of(layer: Layer) -> int:
    """Filters of one of a convolution's groups."""
    assert layer.shape is not None
    return layer.shape.out_channels // layer.shape.conv_groups


def _wanted(layer: Layer, width: int, other: int) -> Wanted:
    """How many of a call's rows of ``width`` entries are drawn, the layer's own cost per row being width * other.

    All tokens. Of a convolution's patches, which overlap, so many that their product costs what the layer itself does,
    the least share at least, but no more than the width, or 512.
    """
    if layer.kind == "Linear":
        return lambda rows: rows
    return lambda rows: min(rows, round(rows * max(LEAST_SHARE, other / width)), max(width, ENOUGH_ROWS))


def rows_wanted(layer: Layer) -> Wanted:
    """How many rows of a call's input are drawn."""
    return _wanted(layer, columns_of(layer), filters_of(layer))


def _geometry(layer: Layer) -> tuple[Any, ...]:
    """Layers that agree in it make the same rows of the same input."""
    names = ("kernel_size", "stride", "dilation", "padding", "padding_mode", "groups")
    own = tuple(getattr(layer.module, name, None) for name in names)
    return layer.kind, own, filters_of(layer) if layer.kind != "Linear" else 0


def _check(layer: Layer, second: Tensor, gradient: Tensor | None) -> None:
    for name, value in (("input", second), ("gradient", gradient)):
        if value is not None and not bool(value.diagonal(dim1=-2, dim2=-1).isfinite().all()):  # sums of squares
            raise ModelError(
                f"layer {label(layer.name)}: its {name} has NaN or infinite values on this data; mend the data, or "
                f"leave the layer out with exclude={[layer.name]!r}"
            )
