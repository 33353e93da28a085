"""``alds_fast::lowrank_linears``: the operator of torch, with fake implementation, gradients and FLOP counts.

The fused kernel runs in Triton and nothing else does. The backward pass is plain library calls that compute the hidden
values anew: forward is fused, backward is not. On the CPU it runs only under Triton's interpreter. Importing this needs
no triton: it is imported by the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .op_shared import (
    are_contiguous,
    as_operator,
    contiguous,
    contiguous_like,
    differentiated_by,
    flop_formula,
    on_device_of,
    rows_like,
    rows_of,
    rows_view,
    triton_module,
    without_values,
)
from .reference import dequantized_all


def plan_linears_call(x: Tensor, encoder: Tensor, decoders: Sequence[Tensor], biases: Sequence[Tensor | None],
                      scales: Sequence[Tensor]) -> Callable[..., list[Tensor]]:  # fmt: skip
    """The fused kernels for tensors like these; called with such tensors, on the device that is the current one."""
    count, shapes = len(decoders), [(*x.shape[:-1], d.shape[0]) for d in decoders]
    if not x.numel():
        return lambda x, *_: [x.new_empty(shape) for shape in shapes]
    as_they_are = rows_view(x) is not None and are_contiguous(encoder, *decoders, *biases, *scales)
    first, *others = contiguous_like(encoder, *decoders, *biases)
    few = first, others[:count], others[count:], None, 1, None, None, contiguous_like(*scales)
    run = triton_module("few_rows").plan_few_rows(rows_like(x), *few)

    def call(x: Tensor, encoder: Tensor, decoders: Sequence[Tensor], biases: Sequence[Tensor | None],
             scales: Sequence[Tensor]) -> list[Tensor]:  # fmt: skip
        ys = [x.new_empty(shape) for shape in shapes]
        if as_they_are:
            run(x, encoder, decoders, biases, None, None, scales, ys)
        else:
            first, *others = contiguous(encoder, *decoders, *biases)
            run(rows_of(x), first, others[:count], others[count:], None, None, contiguous(*scales), ys)
        return ys

    return call


@as_operator("lowrank_linears")
def lowrank_linears_op(
    x: Tensor, encoder: Tensor, decoders: Sequence[Tensor], biases: Sequence[Tensor], has_bias: Sequence[bool],
    scales: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Up to three layers with one encoder launch; ``biases`` holds those of the layers with ``has_bias``."""
    rest = iter(biases)
    tensors = x, encoder, decoders, [next(rest) if b else None for b in has_bias], scales
    with on_device_of(x):
        return plan_linears_call(*tensors)(*tensors)


@without_values("lowrank_linears")
def _(
    x: Tensor, encoder: Tensor, decoders: Sequence[Tensor], biases: Sequence[Tensor], has_bias: Sequence[bool],
    scales: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty((*x.shape[:-1], d.shape[0])) for d in decoders]


def _linears_save(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, encoder, decoders, _, has_bias, scales = inputs
    ctx.save_for_backward(x, encoder, *decoders)
    ctx.has_bias, ctx.scales = list(has_bias), list(scales)


def _linears_backward(ctx: Any, grads: list[Tensor]) -> tuple:
    x, encoder, *decoders = ctx.saved_tensors
    if ctx.scales:  # such factors have no gradients
        encoder, *decoders = dequantized_all([encoder, *decoders], ctx.scales)
    hidden = F.linear(x, encoder).reshape(-1, encoder.shape[0])
    rows = [g.reshape(-1, g.shape[-1]) for g in grads]
    parts = hidden.split([d.shape[1] for d in decoders], 1)
    grad_hidden = torch.cat([g @ d for g, d in zip(rows, decoders, strict=True)], 1)
    grad_decoders = [None if ctx.scales else g.mT @ h for g, h in zip(rows, parts, strict=True)]
    grad_biases = [g.sum(0) for g, b in zip(rows, ctx.has_bias, strict=True) if b]
    grad_encoder = None if ctx.scales else grad_hidden.mT @ x.reshape(-1, x.shape[-1])
    no_grads = None, [None] * len(ctx.scales)
    return (grad_hidden @ encoder).view(x.shape), grad_encoder, grad_decoders, grad_biases, *no_grads


differentiated_by("lowrank_linears", _linears_backward, _linears_save)


@flop_formula("lowrank_linears")
def _linears_flops(
    x_shape: Sequence[int], encoder_shape: Sequence[int], decoder_shapes: Sequence[Sequence[int]], *_: Any, **__: Any
) -> int:
    rows = 1
    for n in x_shape[:-1]:
        rows *= n
    return 2 * rows * (encoder_shape[0] * encoder_shape[1] + sum(a * b for a, b in decoder_shapes))
