"""``alds_fast::lowrank_linear``: the operator of torch, with fake implementation, gradients and FLOP counts.

The fused kernel runs in Triton and nothing else does. The backward pass is plain library calls that compute the hidden
values anew: forward is fused, backward is not. On the CPU it runs only under Triton's interpreter. Importing this needs
no triton: it is imported by the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .op_shared import (
    are_contiguous,
    as_operator,
    contiguous,
    contiguous_like,
    decoder_output,
    differentiated_by,
    flop_formula,
    on_device_of,
    rows_like,
    rows_of,
    rows_view,
    save_inputs,
    triton_module,
    without_values,
)
from .pivot_table import outputs_number, outputs_of
from .reference import activation_grad, decode_linear, dequantized_all, encode_linear


def plan_linear_call(tensors: Sequence[Any], groups: int, activation: str | None) -> Callable[..., Tensor]:
    """The fused kernel for tensors like these: x, encoder, decoder, bias, residual, order and scales of int8 factors.

    It is called with such tensors, on the device that is the current one.
    """
    x, encoder, decoder, bias, residual, order, *scales = tensors
    shape = *x.shape[:-1], outputs_number(decoder, order)
    if 0 in shape:
        return lambda x, *_: x.new_empty(shape)
    others = encoder, decoder, bias, residual
    as_they_are = rows_view(x) is not None and are_contiguous(*others, *scales)
    few, scale = contiguous_like(*others), contiguous_like(*scales)
    run = triton_module("linear").plan_linear(rows_like(x), *few, groups, activation, order, scale)

    def call(
        x: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, residual: Tensor | None,
        order: Tensor | None, *scales: Tensor,
    ) -> Tensor:  # fmt: skip
        y = x.new_empty(shape)
        outputs = None if order is None else outputs_of(order)
        if as_they_are:
            run(x, encoder, decoder, bias, residual, outputs, scales, y)
        else:
            run(rows_of(x), *contiguous(encoder, decoder, bias, residual), outputs, contiguous(*scales), y)
        return y

    return call


@as_operator("lowrank_linear")
def lowrank_linear_op(
    x: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    activation: str | None,
    order: Tensor | None = None,
    encoder_scale: Tensor | None = None,
    decoder_scale: Tensor | None = None,
) -> Tensor:
    """The fused kernel; arguments as of :func:`alds_fast.kernels.lowrank_linear`, checked there."""
    scales = () if encoder_scale is None or decoder_scale is None else (encoder_scale, decoder_scale)
    tensors = x, encoder, decoder, bias, residual, order, *scales
    with on_device_of(x):
        return plan_linear_call(tensors, groups, activation)(*tensors)


@without_values("lowrank_linear")
def _(
    x: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    activation: str | None,
    order: Tensor | None = None,
    encoder_scale: Tensor | None = None,
    decoder_scale: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs_number(decoder, order)))


def _linear_backward(ctx: Any, grad: Tensor) -> tuple:
    x, encoder, decoder, bias, residual = ctx.saved_tensors
    groups, activation, order, *scales = ctx.options
    is_int8 = scales[0] is not None  # such factors have no gradients
    if is_int8:
        encoder, decoder = dequantized_all((encoder, decoder), scales)
    hidden = encode_linear(x, encoder, groups)
    if activation is not None:
        grad = activation_grad(grad, decoder_output(decode_linear(hidden, decoder, order), bias, residual), activation)
    rows = told = grad.reshape(-1, grad.shape[-1])
    if order is not None:  # of the hidden values, and then of the decoder's rows
        pivots, told = rows.index_select(1, order.argsort()).tensor_split([encoder.shape[0]], 1)
    grad_hidden = told @ decoder if order is None else pivots + told @ decoder
    grad_hidden = grad_hidden.view(*grad.shape[:-1], groups, -1)
    slices = encoder.unflatten(0, (groups, -1))
    grad_x = torch.einsum("...gr,grc->...gc", grad_hidden, slices).flatten(-2)
    grad_encoder = grad_decoder = None
    if not is_int8:
        split, grad_rows = x.reshape(-1, groups, slices.shape[2]), grad_hidden.reshape(-1, *grad_hidden.shape[-2:])
        grad_encoder = torch.einsum("mgr,mgc->grc", grad_rows, split).flatten(0, 1)
        grad_decoder = told.mT @ hidden.reshape(-1, hidden.shape[-1])
    return (
        grad_x, grad_encoder, grad_decoder, None if bias is None else rows.sum(0),
        None if residual is None else grad, None, None, None, None, None,
    )  # fmt: skip


differentiated_by("lowrank_linear", _linear_backward, save_inputs)


@flop_formula("lowrank_linear")
def _linear_flops(
    x_shape: Sequence[int], encoder_shape: Sequence[int], decoder_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    rows = 1
    for n in x_shape[:-1]:
        rows *= n
    return 2 * rows * (encoder_shape[0] * encoder_shape[1] + decoder_shape[0] * decoder_shape[1])
