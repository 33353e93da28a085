"""The low-rank layers as plain PyTorch calls: what "two-op" runs, what training differentiates, what tests compare to.

Every function here works in any floating type on any device; called with float64 it is the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from .backend import is_transformed
from .pivot_table import outputs_of

FEW_ROWS = 64  # below which operations cost more than what they move
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}
Pair = tuple[int, int]


class Half(NamedTuple):
    """Stride, padding and dilation of one of the two convolutions."""

    stride: Pair
    padding: Pair
    dilation: Pair


def epilogue(z: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """activation(z + residual); the activation is None, "relu", "silu" or "gelu" (with erf)."""
    if residual is not None:
        z = z + residual
    return z if activation is None else ACTIVATIONS[activation](z)


def activation_grad(grad: Tensor, z: Tensor, activation: str | None) -> Tensor:
    """Gradient with respect to z of activation(z)."""
    if activation is None:
        return grad
    if activation == "relu":
        return grad * (z > 0)
    if activation == "silu":
        s = torch.sigmoid(z)
        return grad * (s * (1 + z * (1 - s)))
    cdf = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    return grad * (cdf + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi))


def quantized_rows(factor: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and a scale for every row, absmax / 127, in the type of the factor; a row of zeros has scale 0.

    Values are rounded to multiples of the scale as it is stored, so that its own rounding adds nothing.

    >>> values, scale = quantized_rows(torch.tensor([[127.0, -63.6], [0.0, 0.0]]))
    >>> values.tolist(), scale.tolist()
    ([[127, -64], [0, 0]], [1.0, 0.0])
    """
    wide = factor.detach().to(torch.promote_types(factor.dtype, torch.float32))
    scale = (wide.abs().amax(1) / 127).to(factor.dtype)
    step = scale.to(wide.dtype)
    step = torch.where(step > 0, step, 1).unsqueeze(1)
    return (wide / step).round().clamp(-127, 127).to(torch.int8), scale


def dequantized(factor: Tensor, scale: Tensor) -> Tensor:
    """An int8 factor with a scale for every row, in the type of the scales."""
    return factor.to(scale.dtype) * scale.unsqueeze(-1)


def dequantized_all(factors: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Tensor]:
    """Factors in the type of their scales; as they are without any."""
    return [dequantized(*pair) for pair in zip(factors, scales, strict=True)] if scales else list(factors)


def encode_linear(x: Tensor, encoder: Tensor, groups: int) -> Tensor:
    """blockdiag(encoder) @ x: x (..., c), encoder (groups * rank, c / groups) to (..., groups * rank)."""
    if groups == 1:
        return F.linear(x, encoder)
    if x.shape[-1] != groups * encoder.shape[1]:
        raise ArgumentError(f"x {tuple(x.shape)} has {x.shape[-1]} channels, expected {groups * encoder.shape[1]}")
    blocks = encoder.unflatten(0, (groups, -1))
    return torch.einsum("...gc,grc->...gr", x.unflatten(-1, (groups, -1)), blocks).flatten(-2)


def in_this_order(x: Tensor, order: Tensor) -> Tensor:
    """The last dimension's entries in another order: of rows, as torch takes 40 times as long for more dimensions."""
    return x.reshape(-1, x.shape[-1]).index_select(-1, order).view_as(x)


def decode_linear(
    hidden: Tensor, decoder: Tensor, order: Tensor | None, bias: Tensor | None = None, in_order: bool = False
) -> Tensor:
    """decoder @ hidden + bias; with ``order`` the outputs it names among the hidden values followed by the product.

    ``in_order`` says that it names these one after the other.
    """
    if order is None:
        return F.linear(hidden, decoder, bias)
    y = torch.cat([hidden, F.linear(hidden, decoder)], -1)
    y = y if in_order else in_this_order(y, order)
    return y if bias is None else y + bias.to(y.dtype)


def _linear_in_one_buffer(x: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None) -> Tensor:
    """Pivots and then all other outputs, without gradients: both products are written to where they belong."""
    rank = encoder.shape[0]
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty(rows.shape[0], rank + decoder.shape[0])
    hidden, rest = y.tensor_split([rank], 1)
    torch.mm(rows, encoder.mT, out=hidden)
    if bias is None:
        torch.mm(hidden, decoder.mT, out=rest)
    else:
        torch.addmm(bias[rank:], hidden, decoder.mT, out=rest)
        hidden += bias[:rank]
    return y.view(*x.shape[:-1], -1)


def _is_plain_call(x: Tensor) -> bool:
    """Whether nobody looks at the single operations: no gradients, compiler, autocast or subclass of tensors."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if torch.is_grad_enabled() or traced or type(x) is not Tensor or is_transformed(x):
        return False
    written_whole = x.is_cuda or x.dtype in (torch.float32, torch.float64)  # half types read what was there on CPUs
    return written_whole and not torch.is_autocast_enabled(x.device.type)


def lowrank_pivoted_ref(
    x: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, order: Tensor, in_order: bool
) -> Tensor:
    """A linear layer with output pivots as library calls.

    ``in_order`` says that ``order`` is 0, 1, 2, ..., so that nothing is to be put in another order.
    """
    if not _is_plain_call(x) or x.numel() < FEW_ROWS * x.shape[-1]:
        return decode_linear(F.linear(x, encoder), decoder, order, bias, in_order)
    if in_order:
        return _linear_in_one_buffer(x, encoder, decoder, bias)
    sorted_bias = None if bias is None else bias.index_select(0, outputs_of(order))
    return in_this_order(_linear_in_one_buffer(x, encoder, decoder, sorted_bias), order)


def lowrank_linear_ref(
    x: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    groups: int = 1,
    activation: str | None = None,
    order: Tensor | None = None,
    in_order: bool = False,
) -> Tensor:
    """activation(decoder @ blockdiag(encoder) @ x + bias + residual) as library calls."""
    if order is not None:
        return epilogue(lowrank_pivoted_ref(x, encoder, decoder, bias, order, in_order), residual, activation)
    return epilogue(F.linear(encode_linear(x, encoder, groups), decoder, bias), residual, activation)


def halves(
    encoder: Sequence[int],
    decoder: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Half, Half]:
    """How encoder and decoder, given their weights' shapes, share the options of the whole convolution.

    An axis belongs to the half whose kernel is larger than 1 there, to the encoder where both are 1. Raises
    ArgumentError where both are larger than 1.
    """
    owner = []
    for axis in (2, 3):
        if encoder[axis] > 1 and decoder[axis] > 1:
            raise ArgumentError(
                f"encoder {tuple(encoder)} and decoder {tuple(decoder)} both have a kernel along axis {axis - 2}; one "
                f"of them must be 1 there"
            )
        owner.append(decoder[axis] > 1)
    neutral = (1, 0, 1)
    values = tuple(zip(stride, padding, dilation, strict=True))
    first, second = (
        [v if own is side else neutral for v, own in zip(values, owner, strict=True)] for side in (False, True)
    )
    return Half(*zip(*first, strict=True)), Half(*zip(*second, strict=True))


def output_size(x: Sequence[int], encoder: Sequence[int], decoder: Sequence[int], stride: Sequence[int],
                padding: Sequence[int], dilation: Sequence[int]) -> list[int]:  # fmt: skip
    """(height, width) of the convolution's output for an input of shape (n, c, h, w)."""
    kernel = [e * d for e, d in zip(encoder[2:], decoder[2:], strict=True)]
    options = zip(x[2:], kernel, stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in options]


def two_linear_calls(
    groups: int, activation: str | None, x: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None,
    residual: Tensor | None, order: Tensor | None, *scale: Tensor,
) -> Tensor:  # fmt: skip
    """:func:`lowrank_linear_ref`, of int8 factors if they have scales."""
    first, second = dequantized_all((encoder, decoder), scale)
    return lowrank_linear_ref(x, first, second, bias, residual, groups, activation, order)


def merged_linear_calls(x: Tensor, encoder: Tensor, decoders: Sequence[Tensor], biases: Sequence[Tensor | None],
                        scale: Sequence[Tensor]) -> list[Tensor]:  # fmt: skip
    """Layers that share one call of their encoders, of int8 factors if they have scales."""
    first, *others = dequantized_all([encoder, *decoders], scale)
    hidden = F.linear(x, first).split([d.shape[1] for d in decoders], -1)
    return [F.linear(h, d, b) for h, d, b in zip(hidden, others, biases, strict=True)]


def lowrank_conv2d_ref(
    x: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    groups: int = 1,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    activation: str | None = None,
) -> Tensor:
    """The grouped encoder convolution, then the decoder convolution, as library calls."""
    first, second = halves(encoder.shape, decoder.shape, stride, padding, dilation)
    hidden = F.conv2d(x, encoder, None, *first, groups)
    return epilogue(F.conv2d(hidden, decoder, bias, *second), residual, activation)
