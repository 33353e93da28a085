"""``alds_fast::lowrank_linear``: the operator of torch, with fake implementation, gradients and FLOP counts.

The fused kernel runs in Triton and nothing else does. The backward pass is plain library calls that compute the hidden
values anew: forward is fused, backward is not. On the CPU it runs only under Triton's interpreter. Importing this needs
no triton: it is imported by the first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .op_shared import decoder_output, flop_formula, on_device_of, rows_of, save_inputs, triton_module
from .reference import activation_grad, encode_linear


@torch.library.custom_op("alds_fast::lowrank_linear", mutates_args=(), device_types=("cuda", "cpu"))
def lowrank_linear_op(
    x: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    activation: str | None,
) -> Tensor:
    """The fused kernel; arguments as of :func:`alds_fast.kernels.lowrank_linear`, checked there."""
    y = x.new_empty((*x.shape[:-1], decoder.shape[0]))
    if y.numel():
        extra, bias = (None if t is None else t.contiguous() for t in (residual, bias))
        with on_device_of(x):
            triton_module("linear").run_linear(
                rows_of(x), encoder, decoder, bias, extra, groups, activation, y.view(-1, decoder.shape[0])
            )
    return y


@lowrank_linear_op.register_fake
def _(
    x: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    activation: str | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], decoder.shape[0]))


def _linear_backward(ctx: Any, grad: Tensor) -> tuple:
    x, encoder, decoder, bias, residual = ctx.saved_tensors
    groups, activation = ctx.options
    hidden = encode_linear(x, encoder, groups)
    if activation is not None:
        grad = activation_grad(grad, decoder_output(F.linear(hidden, decoder), bias, residual), activation)
    rows = grad.reshape(-1, grad.shape[-1])
    grad_hidden = (grad @ decoder).unflatten(-1, (groups, -1))
    slices = encoder.unflatten(0, (groups, -1))
    grad_x = torch.einsum("...gr,grc->...gc", grad_hidden, slices).flatten(-2)
    split = x.reshape(-1, groups, slices.shape[2])
    grad_encoder = torch.einsum("mgr,mgc->grc", grad_hidden.reshape(-1, *grad_hidden.shape[-2:]), split).flatten(0, 1)
    grad_decoder = rows.mT @ hidden.reshape(-1, hidden.shape[-1])
    return (
        grad_x, grad_encoder, grad_decoder, None if bias is None else rows.sum(0),
        None if residual is None else grad, None, None,
    )  # fmt: skip


lowrank_linear_op.register_autograd(_linear_backward, setup_context=save_inputs)


@flop_formula("lowrank_linear")
def _linear_flops(
    x_shape: Sequence[int], encoder_shape: Sequence[int], decoder_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    rows = 1
    for n in x_shape[:-1]:
        rows *= n
    return 2 * rows * (encoder_shape[0] * encoder_shape[1] + decoder_shape[0] * decoder_shape[1])
