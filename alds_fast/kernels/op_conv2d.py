"""``alds_fast::lowrank_conv2d``: the operator of torch, with fake implementation, gradients and FLOP counts.

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

from .limits import MAX_HIDDEN
from .op_linear import plan_linear_call
from .op_shared import (
    are_contiguous,
    as_operator,
    contiguous,
    contiguous_like,
    decoder_output,
    differentiated_by,
    flop_formula,
    on_device_of,
    save_inputs,
    triton_module,
    without_values,
)
from .reference import activation_grad, halves, output_size

LAST = torch.channels_last


def _output_shape(x: Tensor, encoder: Tensor, decoder: Tensor, stride: Sequence[int], padding: Sequence[int],
                  dilation: Sequence[int]) -> tuple[int, ...]:  # fmt: skip
    size = output_size(x.shape, encoder.shape, decoder.shape, stride, padding, dilation)
    return x.shape[0], decoder.shape[0], *size


def _over_pixels(
    x: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, residual: Tensor | None
) -> list[Any]:
    """A 1 x 1 convolution of stride 1 as a linear layer."""
    extra = None if residual is None else residual.permute(0, 2, 3, 1)
    return [x.permute(0, 2, 3, 1), encoder.flatten(1), decoder.flatten(1), bias, extra, None]


def plan_conv2d_call(
    tensors: Sequence[Any], groups: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    activation: str | None,
) -> Callable[..., Tensor]:  # fmt: skip
    """The fused kernel for tensors like these: x, encoder, decoder, bias and residual.

    It is called with such tensors, on the device that is the current one.
    """
    x, encoder, decoder, bias, residual = tensors
    shape = _output_shape(x, encoder, decoder, stride, padding, dilation)
    if 0 in shape:
        return lambda x, *_: torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAST)
    scheme_3 = decoder.shape[2:].numel() > 1
    pointwise = encoder.shape[2:] == (1, 1) and (*stride, *padding) == (1, 1, 0, 0)
    if pointwise and not scheme_3 and len(encoder) <= MAX_HIDDEN:
        run = plan_linear_call(_over_pixels(*tensors), groups, activation)
        return lambda *those: run(*_over_pixels(*those)).permute(0, 3, 1, 2)
    as_they_are = are_contiguous(bias) and are_contiguous(x, encoder, decoder, residual, memory_format=LAST)
    x, encoder, decoder, residual = contiguous_like(x, encoder, decoder, residual, memory_format=LAST)
    given = x, encoder, decoder, *contiguous_like(bias), residual
    of = groups, stride, padding, dilation, activation, shape[2:]
    if scheme_3:
        launch = triton_module("conv2d_walk").plan_conv2d_walk(*given, activation)
    else:
        launch = triton_module("conv2d").plan_conv2d(*given, *of)

    def call(x: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAST)
        if as_they_are:
            launch(x, encoder, decoder, bias, residual, y)
        else:
            *those, extra = contiguous(x, encoder, decoder, residual, memory_format=LAST)
            launch(*those, *contiguous(bias), extra, y)
        return y

    return call


@as_operator("lowrank_conv2d")
def lowrank_conv2d_op(
    x: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str | None,
) -> Tensor:
    """The fused kernel; arguments as of :func:`alds_fast.kernels.lowrank_conv2d`, checked there."""
    tensors = x, encoder, decoder, bias, residual
    with on_device_of(x):
        return plan_conv2d_call(tensors, groups, stride, padding, dilation, activation)(*tensors)


@without_values("lowrank_conv2d")
def _(
    x: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str | None,
) -> Tensor:
    shape = _output_shape(x, encoder, decoder, stride, padding, dilation)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAST)


def _conv_grads(grad: Tensor, x: Tensor, weight: Tensor, options: Any, groups: int) -> tuple[Tensor, Tensor]:
    gradients = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *options, False, [0, 0], groups, [True, True, False]
    )
    return gradients[0], gradients[1]


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple:
    x, encoder, decoder, bias, residual = ctx.saved_tensors
    groups, stride, padding, dilation, activation = ctx.options
    first, second = halves(encoder.shape, decoder.shape, stride, padding, dilation)
    hidden = F.conv2d(x, encoder, None, *first, groups)
    if activation is not None:
        column = None if bias is None else bias[:, None, None]
        z = decoder_output(F.conv2d(hidden, decoder, None, *second), column, residual)
        grad = activation_grad(grad, z, activation)
    grad_hidden, grad_decoder = _conv_grads(grad, hidden, decoder, second, 1)
    grad_x, grad_encoder = _conv_grads(grad_hidden, x, encoder, first, groups)
    return (
        grad_x, grad_encoder, grad_decoder, None if bias is None else grad.sum((0, 2, 3)),
        None if residual is None else grad, None, None, None, None, None,
    )  # fmt: skip


differentiated_by("lowrank_conv2d", _conv2d_backward, save_inputs)


@flop_formula("lowrank_conv2d")
def _conv2d_flops(
    x_shape: Sequence[int], encoder_shape: Sequence[int], decoder_shape: Sequence[int], bias: Any, residual: Any,
    groups: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], *_: Any, **__: Any,
) -> int:  # fmt: skip
    """That of the two convolutions, whatever the kernel computes twice."""
    from torch.utils.flop_counter import conv_flop_count

    first, second = halves(encoder_shape, decoder_shape, stride, padding, dilation)
    one = [1, 1, 1, 1]
    middle = [x_shape[0], encoder_shape[0], *output_size(x_shape, encoder_shape, one, *first)]
    out = [x_shape[0], decoder_shape[0], *output_size(middle, one, decoder_shape, *second)]
    return conv_flop_count(list(x_shape), list(encoder_shape), middle) + conv_flop_count(
        middle, list(decoder_shape), out
    )
