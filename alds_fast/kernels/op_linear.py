"""``alds_fast::lowrank_linear``: the operator of torch, with fake implementation, gradients and FLOP counts.

The fused kernel runs in Triton and nothing else does. The backward pass is plain library calls that compute the hidden
values anew: forward is fused, backward is not. On the CPU it runs only under Triton's interpreter. Importing this needs
no triton: it is imported by the first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .op_shared import (
    as_operator,
    decoder_output,
    differentiated_by,
    flop_formula,
    on_device_of,
    rows_of,
    save_inputs,
    triton_module,
    without_values,
)
from .pivot_table import outputs_number, outputs_of
from .reference import activation_grad, decode_linear, dequantized_all, encode_linear


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
    y = x.new_empty((*x.shape[:-1], outputs_number(decoder, order)))
    if y.numel():
        extra, bias = (None if t is None else t.contiguous() for t in (residual, bias))
        with on_device_of(x):
            outputs = None if order is None else outputs_of(order)
            scales = () if encoder_scale is None else (encoder_scale, decoder_scale)
            triton_module("linear").run_linear(
                rows_of(x), encoder, decoder, bias, extra, groups, activation, outputs, y.view(-1, y.shape[-1]), scales
            )
    return y


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
