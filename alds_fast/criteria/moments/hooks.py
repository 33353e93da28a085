"""Hooks that sum up what layers see, call after call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...layers import DecomposableLayer, Routed, is_linear, label, routed_rows
from ...linalg import WeightShape
from ...measurement import Masks, first_input
from .held_rows import HeldRows
from .rows import Wanted, by_side, fitting_mask, gives_tokens, outputs, patches
from .sums import DiagonalSums, ProductSums

LEAST_SHARE = 1 / 64  # of a convolution's patches, even where their product then costs more than the layer
ENOUGH_ROWS = 512  # a call
WIDEST_WHOLE = 2048  # of a layer, whose gradients' moment is kept whole
MAX_OUTPUTS = 8192  # of a layer, whose own moment is kept where that of its input is too large
ROWS_PER_COLUMN = 2  # of a moment, where the data has them
CALL_SEEDS = 1 << 16  # of a batch's calls


class Form(NamedTuple):
    """How a layer's moments are kept.

    ``by_output``: that of its output, not of its input. ``diagonal``: of the gradients' moment the diagonal alone.
    """

    by_output: bool
    diagonal: bool

    def size(self, shape: WeightShape, gradients: bool) -> int:
        """Bytes of a layer's moments in this form."""
        filters = shape.filters_per_group
        numbers = filters**2 if self.by_output else shape.columns**2
        numbers += (filters if self.diagonal else filters**2) if gradients else 0
        return 8 * shape.conv_groups * numbers


def moment_forms(
    layers: Sequence[DecomposableLayer], order: int, gradients: bool, memory: int | None
) -> dict[str, Form]:
    """The form of every layer's moments, by name, so that all fit in so many bytes; without those left out.

    Gradients of more than 2,048 filters are kept as a diagonal. Where all together is too much, those of the widest
    layers are too, and then the largest layers are left out, as is a layer with too many inputs and outputs.
    """
    shapes, tables = {layer.name: layer.shape for layer in layers}, {la.name for la in layers if la.is_table}
    forms = {n: Form(s.columns > order or n in tables, s.filters_per_group > WIDEST_WHOLE) for n, s in shapes.items()}
    forms = {n: form for n, form in forms.items() if not (form.by_output and shapes[n].filters_per_group > MAX_OUTPUTS)}
    if memory is None:
        return forms
    need = sum(form.size(shapes[n], gradients) for n, form in forms.items())
    for name in sorted(forms, key=lambda n: shapes[n].filters_per_group, reverse=True) if gradients else ():
        if need > memory:
            need -= forms[name].size(shapes[name], gradients)
            forms[name] = forms[name]._replace(diagonal=True)
            need += forms[name].size(shapes[name], gradients)
    for name in sorted(forms, key=lambda n: forms[n].size(shapes[n], gradients), reverse=True):
        if need > memory:
            need -= forms.pop(name).size(shapes[name], gradients)
    return forms


class Collector:
    """Hooks on the layers, and what they have summed up."""

    def __init__(self, layers: Sequence[DecomposableLayer], forms: Mapping[str, Form], gradients: bool) -> None:
        self.layers, self.gradients = layers, gradients
        self.masks = Masks()
        self.tokens = self.masked = False  # whether a Linear layer has been called, and a mask fitted
        self.aside: Tensor | None = None
        self.held: dict[str, HeldRows] = {layer.name: HeldRows() for layer in layers}
        self.sums: dict[str, ProductSums] = {layer.name: ProductSums() for layer in layers}
        self.gradient_sums: dict[str, ProductSums | DiagonalSums] = {
            layer.name: DiagonalSums() if forms[layer.name].diagonal else ProductSums() for layer in layers if gradients
        }
        self.by_output = {layer.name for layer in layers if forms[layer.name].by_output}
        self.energy, self.number, self.seed = 0.0, 0, 0
        self.last: tuple[Any, ...] = (lambda: None, None, [], 0)
        self.leaders: dict[str, set[str]] = {layer.name: set() for layer in layers}
        self.last_name = ""
        self.back = False  # in a backward pass, where checkpointed layers are called again: inputs do not count

    def begin(self, number: int, masks: Masks, aside: Tensor) -> None:
        """What is seen from here on is of the batch of that number."""
        self.number, self.masks, self.aside, self.seed = number, masks, aside, (number - 1) * CALL_SEEDS

    @contextmanager
    def hooks(self) -> Iterator[None]:
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

    def _on_input(self, layer: DecomposableLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.back:
                with torch.inference_mode(False):  # the model may run in it; the sums are to be added to later
                    self._add_input(layer, first_input(args, kwargs))

        return hook

    def _add_input(self, layer: DecomposableLayer, x: Tensor) -> None:
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            raise ModelError(
                f"layer {label(layer.name)} runs within torch.func.vmap or grad, where its inputs cannot be collected; "
                f"leave out data=, or the layer with exclude={[layer.name]!r}"
            )
        key = (*_geometry(layer), None if x.is_inference() else x._version)
        seen, known, products, rows = self.last
        sums, linear = self.sums[layer.name], is_linear(layer.module)
        same = linear and seen() is x and known == key  # q, k and v read one tensor
        if same and (not sums.begun or sums.shift is products[0].shift):
            self.leaders[layer.name].add(self.last_name)
        else:
            keep, routed = fitting_mask(layer, x, self.masks, routed_rows()), routed_rows()
            self.tokens, self.masked = self.tokens or linear, self.masked or keep is not None
            used, aside = by_side(layer.module, x.detach(), keep, self.aside, routed)
            if aside is not None:
                self._hold(layer, patches(layer.module, *aside, HeldRows.wanted, self.seed)[0])
            samples, rows = patches(layer.module, *used, rows_to_draw(layer, sums.drawn), self.seed)
            products = sums.products(samples)
            if linear:  # convolutions rarely share an input, and their strips may be large
                products = [replace(product, strips=list(product.strips)) for product in products]
                self.last, self.last_name = (weakref.ref(x), key, products, rows), layer.name
            self.seed += 1
            self.leaders[layer.name].add(layer.name)
        if same:
            self.held[layer.name] = self.held[self.last_name]
        sums.add(products, rows)

    def _on_output(self, layer: DecomposableLayer) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
            if layer.name in self.by_output and not self.back:
                with torch.inference_mode(False):
                    self._add_output(layer, y.detach())
            if not self.gradients or not torch.is_grad_enabled():  # or it runs where no gradient can matter
                return None
            if not y.requires_grad:  # nothing before it does: the gradient starts here
                y = y.detach().requires_grad_().clone()
            routed = routed_rows()
            y.register_hook(lambda g: self._add_gradient(layer, g, routed))
            return y

        return hook

    def _add_output(self, layer: DecomposableLayer, y: Tensor) -> None:
        keep, routed = fitting_mask(layer, y, self.masks, routed_rows()), routed_rows()
        self.tokens, self.masked = self.tokens or gives_tokens(layer.module), self.masked or keep is not None
        used, aside = by_side(layer.module, y, keep, self.aside, routed)
        samples, rows = outputs(layer.module, *used)
        bias: Any = getattr(layer.module, "bias", None)
        shift = 0.0 if bias is None else bias.detach().view(samples.shape[1:])
        sums = self.sums[layer.name]
        sums.add(sums.products(samples - shift), rows)
        if aside is not None:
            self._hold(layer, outputs(layer.module, *aside, HeldRows.wanted, self.seed)[0] - shift)

    def _hold(self, layer: DecomposableLayer, rows: Tensor) -> None:
        self.held[layer.name].add(rows, self.number)

    def _add_gradient(self, layer: DecomposableLayer, g: Tensor | None, routed: Routed | None) -> None:
        if g is None:  # what comes after it passes none on
            return
        sums, width = self.gradient_sums[layer.name], layer.shape.filters_per_group
        wanted = _rows_to_draw(layer, width, layer.shape.columns, sums.drawn)
        keep = fitting_mask(layer, g, self.masks, routed)
        samples, rows = outputs(layer.module, g.detach(), keep, wanted, self.seed)
        self.seed += 1
        if isinstance(sums, DiagonalSums):
            sums.add(samples, rows)
        else:
            sums.add(sums.products(samples, centred=False), rows)


def _rows_to_draw(layer: DecomposableLayer, width: int, other: int, drawn: int) -> Wanted:
    """How many of a call's rows of ``width`` entries are drawn, the layer's own cost per row being width * other.

    All tokens. Of a convolution's patches, which overlap, so many that their product costs what the layer itself does,
    the least share at least, but no more than the width, or 512; as long as fewer than two for every entry have been
    ``drawn`` before, as many more as are there.
    """
    if gives_tokens(layer.module):
        return lambda rows: rows
    share, most = max(LEAST_SHARE, other / width), max(width, ENOUGH_ROWS)
    return lambda rows: min(rows, max(min(round(rows * share), most), ROWS_PER_COLUMN * width - drawn))


def rows_to_draw(layer: DecomposableLayer, drawn: int) -> Wanted:
    """How many rows of a call's input are drawn, after ``drawn`` of the calls before."""
    return _rows_to_draw(layer, layer.shape.columns, layer.shape.filters_per_group, drawn)


def _geometry(layer: DecomposableLayer) -> tuple[Any, ...]:
    """Layers that agree in it make the same rows of the same input."""
    names = ("kernel_size", "stride", "dilation", "padding", "padding_mode", "output_padding", "groups")
    options = tuple(getattr(layer.module, name, None) for name in names)
    return layer.kind, options, 0 if is_linear(layer.module) else layer.shape.filters_per_group
