"""The fused kernels as operators of torch: with fake implementations, gradients and FLOP counts.

``alds_fast::lowrank_linear``, ``alds_fast::lowrank_conv2d`` and ``alds_fast::lowrank_linears`` run the Triton kernels
and nothing else. The backward passes are plain library calls that compute the hidden values anew: forward is fused,
backward is not. On the CPU they run only under Triton's interpreter. Importing this needs triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from .reference import activation_grad, encode_linear, halves, output_size
from .triton_conv2d import run_conv2d
from .triton_few_rows import run_merged
from .triton_linear import run_linear

# ---------------------------------------------------------------------------------------------- linear


def _on(x: Tensor) -> Any:
    """Triton launches on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _rows_of(x: Tensor) -> Tensor:
    """x (..., c) as (m, c) with unit stride along the channels; a copy only where that is not a view."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 and rows.stride(0) >= 0 else rows.contiguous()


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
        with _on(x):
            run_linear(_rows_of(x), encoder, decoder, bias, extra, groups, activation, y.view(-1, decoder.shape[0]))
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


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _decoder_output(z: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    z = z if bias is None else z + bias
    return z if residual is None else z + residual


def _linear_backward(ctx: Any, grad: Tensor) -> tuple:
    x, encoder, decoder, bias, residual = ctx.saved_tensors
    groups, activation = ctx.options
    hidden = encode_linear(x, encoder, groups)
    if activation is not None:
        grad = activation_grad(grad, _decoder_output(F.linear(hidden, decoder), bias, residual), activation)
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


lowrank_linear_op.register_autograd(_linear_backward, setup_context=_save)


@register_flop_formula(torch.ops.alds_fast.lowrank_linear)
def _linear_flops(
    x_shape: Sequence[int], encoder_shape: Sequence[int], decoder_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    rows = 1
    for n in x_shape[:-1]:
        rows *= n
    return 2 * rows * (encoder_shape[0] * encoder_shape[1] + decoder_shape[0] * decoder_shape[1])


# --------------------------------------------------------------------------------------------- linears


@torch.library.custom_op("alds_fast::lowrank_linears", mutates_args=(), device_types=("cuda", "cpu"))
def lowrank_linears_op(
    x: Tensor, encoder: Tensor, decoders: Sequence[Tensor], biases: Sequence[Tensor], has_bias: Sequence[bool]
) -> list[Tensor]:
    """Up to three layers with one encoder launch; ``biases`` holds those of the layers with ``has_bias``."""
    ys = [x.new_empty((*x.shape[:-1], d.shape[0])) for d in decoders]
    rest = iter([b.contiguous() for b in biases])
    if x.numel():
        with _on(x):
            run_merged(_rows_of(x), encoder, decoders, [next(rest) if b else None for b in has_bias],
                   [y.view(-1, y.shape[-1]) for y in ys])  # fmt: skip
    return ys


@lowrank_linears_op.register_fake
def _(
    x: Tensor, encoder: Tensor, decoders: Sequence[Tensor], biases: Sequence[Tensor], has_bias: Sequence[bool]
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], d.shape[0])) for d in decoders]


def _linears_save(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, encoder, decoders, _, has_bias = inputs
    ctx.save_for_backward(x, encoder, *decoders)
    ctx.has_bias = list(has_bias)


def _linears_backward(ctx: Any, grads: list[Tensor]) -> tuple:
    x, encoder, *decoders = ctx.saved_tensors
    hidden = F.linear(x, encoder).reshape(-1, encoder.shape[0])
    rows = [g.reshape(-1, g.shape[-1]) for g in grads]
    parts = hidden.split([d.shape[1] for d in decoders], 1)
    grad_hidden = torch.cat([g @ d for g, d in zip(rows, decoders, strict=True)], 1)
    grad_decoders = [g.mT @ h for g, h in zip(rows, parts, strict=True)]
    grad_biases = [g.sum(0) for g, b in zip(rows, ctx.has_bias, strict=True) if b]
    grad_encoder = grad_hidden.mT @ x.reshape(-1, x.shape[-1])
    return (grad_hidden @ encoder).view(x.shape), grad_encoder, grad_decoders, grad_biases, None


lowrank_linears_op.register_autograd(_linears_backward, setup_context=_linears_save)


@register_flop_formula(torch.ops.alds_fast.lowrank_linears)
def _linears_flops(
    x_shape: Sequence[int], encoder_shape: Sequence[int], decoder_shapes: Sequence[Sequence[int]], *_: Any, **__: Any
) -> int:
    rows = 1
    for n in x_shape[:-1]:
        rows *= n
    return 2 * rows * (encoder_shape[0] * encoder_shape[1] + sum(a * b for a, b in decoder_shapes))


# ---------------------------------------------------------------------------------------------- conv2d


def _empty_output(x: Tensor, encoder: Tensor, decoder: Tensor, stride: Sequence[int], padding: Sequence[int],
                  dilation: Sequence[int]) -> Tensor:  # fmt: skip
    size = output_size(x.shape, encoder.shape, decoder.shape, stride, padding, dilation)
    shape = (x.shape[0], decoder.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("alds_fast::lowrank_conv2d", mutates_args=(), device_types=("cuda", "cpu"))
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
    y = _empty_output(x, encoder, decoder, stride, padding, dilation)
    bias = None if bias is None else bias.contiguous()
    if y.numel():
        with _on(x):
            run_conv2d(x, encoder, decoder, bias, residual, groups, stride, padding, dilation, activation, y)
    return y


@lowrank_conv2d_op.register_fake
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
    return _empty_output(x, encoder, decoder, stride, padding, dilation)


def _conv_grads(grad: Tensor, x: Tensor, weight: Tensor, options: Any, groups: int) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *options, False, [0, 0], groups, [True, True, False]
    )
    return found[0], found[1]


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple:
    x, encoder, decoder, bias, residual = ctx.saved_tensors
    groups, stride, padding, dilation, activation = ctx.options
    first, second = halves(encoder.shape, decoder.shape, stride, padding, dilation)
    hidden = F.conv2d(x, encoder, None, *first, groups)
    if activation is not None:
        column = None if bias is None else bias[:, None, None]
        z = _decoder_output(F.conv2d(hidden, decoder, None, *second), column, residual)
        grad = activation_grad(grad, z, activation)
    grad_hidden, grad_decoder = _conv_grads(grad, hidden, decoder, second, 1)
    grad_x, grad_encoder = _conv_grads(grad_hidden, x, encoder, first, groups)
    return (
        grad_x, grad_encoder, grad_decoder, None if bias is None else grad.sum((0, 2, 3)),
        None if residual is None else grad, None, None, None, None, None,
    )  # fmt: skip


lowrank_conv2d_op.register_autograd(_conv2d_backward, setup_context=_save)


@register_flop_formula(torch.ops.alds_fast.lowrank_conv2d)
def _conv2d_flops(
    x_shape: Sequence[int], encoder_shape: Sequence[int], decoder_shape: Sequence[int], bias: Any, residual: Any,
    groups: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], *_: Any, **__: Any,
) -> int:  # fmt: skip
    """That of the two convolutions, whatever the kernel computes twice."""
    first, second = halves(encoder_shape, decoder_shape, stride, padding, dilation)
    one = [1, 1, 1, 1]
    middle = [x_shape[0], encoder_shape[0], *output_size(x_shape, encoder_shape, one, *first)]
    out = [x_shape[0], decoder_shape[0], *output_size(middle, one, decoder_shape, *second)]
    return conv_flop_count(list(x_shape), list(encoder_shape), middle) + conv_flop_count(
        middle, list(decoder_shape), out
    )
