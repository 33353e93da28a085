"""Low-rank linear layers and 2-d convolutions, by the fused kernel or by two library calls.

``backend="two-op"`` runs two library calls on any device. ``backend="fused"`` runs one Triton kernel and raises
BackendError where it cannot; "fused-first", which :func:`alds_fast.deploy` sets where it measured the kernel to be
fastest, runs two calls there. ``backend="auto"`` runs the faster of the two as measured: on a CUDA device, outside
torch.compile, graph capture and training, the first call of every combination of shapes times both (some
milliseconds) and later calls take the winner; :func:`alds_fast.kernels.decisions` shows what was found. Everywhere
else it is two-op; :func:`alds_fast.deploy` measures for those cases too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..errors import ArgumentError
from .arguments import (
    check_alike,
    check_dims,
    check_factors,
    check_input,
    check_int8,
    check_options,
    check_rows,
    pair,
    sizes,
)
from .backend import autocast, is_fused, why_not_fused_conv2d, why_not_fused_linear, why_not_fused_linears
from .calls import keep_call, kind_key, known_call
from .limits import MAX_ROWS
from .op_conv2d import lowrank_conv2d_op, plan_conv2d_call
from .op_linear import lowrank_linear_op, plan_linear_call
from .op_merged_linears import lowrank_linears_op, plan_linears_call
from .pivot_table import check_order
from .reference import dequantized_all, halves, lowrank_conv2d_ref, merged_linear_calls, output_size, two_linear_calls


def lowrank_linear(
    x: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
    order: Tensor | None = None,
    scales: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """activation(decoder @ blockdiag(encoder) @ x + bias + residual).

    Args:
        x: (..., c), any strides; float16, bfloat16, float32 or (two-op only) float64, on CPU or CUDA.
        encoder: (groups * rank, c / groups); row block g reads the g-th run of channels.
        decoder: (f, groups * rank).
        bias: (f,) or None.
        groups: number of channel slices.
        activation: None, "relu", "silu" or "gelu" (with erf).
        residual: (..., f), added before the activation, or None.
        order: of a layer whose hidden values are ``rank`` of its outputs, which a decoder (f - rank, rank) of one slice
            then leaves out: for every output its place among these followed by the decoder's rows, (f,) int64, a
            permutation (which is not checked).
        scales: of int8 factors, one for every row of the encoder, (groups * rank,), and of the decoder, in the type of
            x. Up to 16 rows of x the fused kernel reads the integers, more rows take dequantised factors. Factors so
            stored have no gradients.
        backend: "fused" (CUDA; groups * rank <= 256, or any up to 16 rows), "two-op" or "auto", see
            :mod:`alds_fast.kernels.functional`. The fused kernel multiplies float32 exactly like torch's default
            ("ieee"); ``torch.set_float32_matmul_precision("high")`` turns tf32 on.

    Returns:
        (..., f), of the type and device of x. Differentiable on every backend.

    Raises:
        ArgumentError: shapes, types, devices or options do not fit.
        BackendError: backend="fused" where the kernel cannot run; the message says why.

    >>> import torch
    >>> x, encoder, decoder = torch.ones(2, 4), torch.ones(2, 2), torch.ones(3, 2)
    >>> lowrank_linear(x, encoder, decoder, groups=2)
    tensor([[4., 4., 4.],
            [4., 4., 4.]])
    """
    check_options(activation, backend)
    given = x, encoder, decoder, bias, residual, order, *(scales or ())
    options = "lowrank_linear", groups, activation, backend, scales is None
    key = kind_key(options, given) if isinstance(groups, int) else None
    if (call := known_call(key)) is not None:
        y: Tensor = call(*given)
        return y
    x, encoder, decoder, bias, residual = tensors = autocast(x, encoder, decoder, bias, residual)
    check_dims(2, encoder=encoder, decoder=decoder)
    check_rows(x)
    scale: list[Tensor] = []
    if scales is None:
        check_alike(x, encoder=encoder, decoder=decoder, bias=bias, residual=residual)
    else:
        _, *scale = autocast(x, *scales)
        check_int8(x, {"encoder": encoder, "decoder": decoder}, scale)
        check_alike(x, bias=bias, residual=residual)
        if x.numel() > MAX_ROWS * x.shape[-1]:
            (encoder, decoder), scale, key = dequantized_all((encoder, decoder), scale), [], None
        tensors = [x, encoder, decoder, bias, residual, *scale]
    outputs = decoder.shape[0]
    if order is not None:
        outputs += encoder.shape[0]
        check_order(order, x, outputs, groups)
    check_factors(encoder, decoder, bias, groups, outputs)
    check_input(x, -1, encoder, groups, residual, (*x.shape[:-1], outputs))
    reason = None if backend == "two-op" else why_not_fused_linear(x, encoder)

    args: list[Any] = [x, encoder, decoder, bias, residual, order, *scale]
    fused = partial(lowrank_linear_op, *args[:5], groups, activation, *args[5:])
    two_op = partial(two_linear_calls, groups, activation)
    kind = "lowrank_linear", groups, activation, order is None
    chosen = is_fused(kind, backend, reason, tensors, fused, partial(two_op, *args))
    if key is not None and chosen is not None:
        return keep_call(key, plan_linear_call(args, groups, activation) if chosen else two_op)(*args)
    return fused() if chosen else two_op(*args)


def lowrank_conv2d(
    x: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int = 1,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A grouped encoder convolution, then a decoder convolution: activation(decoder * encoder * x + bias + residual).

    Args:
        x: (n, c, h, w); channels last is fastest; types and devices as of :func:`lowrank_linear`.
        encoder: (groups * rank, c / groups, k1, k2), or with 1 along the axes that the decoder takes.
        decoder: (f, groups * rank, 1, 1), or with a kernel along the axes that the encoder does not have.
        bias: (f,) or None.
        groups: number of channel slices.
        stride, padding, dilation: of the whole convolution, per axis; the half with that axis of the kernel has them.
        activation, residual, backend: as of :func:`lowrank_linear`; residual has the shape of the output. "fused"
            takes any groups and rank with a decoder that is 1 x 1 (scheme 0), and small 3 x 3 decoders (scheme 3).

    Returns:
        (n, f, oh, ow), of the type and device of x; from the fused kernel it is channels last. Differentiable.

    Raises:
        ArgumentError, BackendError: as :func:`lowrank_linear`.

    >>> import torch
    >>> x, encoder, decoder = torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3), torch.ones(4, 1, 1, 1)
    >>> lowrank_conv2d(x, encoder, decoder).flatten()
    tensor([18., 18., 18., 18.])
    """
    stride, padding, dilation = pair(stride, "stride", 1), pair(padding, "padding", 0), pair(dilation, "dilation", 1)
    check_options(activation, backend)
    options = "lowrank_conv2d", groups, stride, padding, dilation, activation, backend
    key = kind_key(options, (x, encoder, decoder, bias, residual)) if isinstance(groups, int) else None
    if (call := known_call(key)) is not None:
        y: Tensor = call(x, encoder, decoder, bias, residual)
        return y
    x, encoder, decoder, bias, residual = tensors = autocast(x, encoder, decoder, bias, residual)
    check_dims(4, x=x, encoder=encoder, decoder=decoder)
    check_alike(x, encoder=encoder, decoder=decoder, bias=bias, residual=residual)
    check_factors(encoder, decoder, bias, groups)
    halves(encoder.shape, decoder.shape, stride, padding, dilation)
    kernel = [e * d for e, d in zip(encoder.shape[2:], decoder.shape[2:], strict=True)]
    size = output_size(x.shape, encoder.shape, decoder.shape, stride, padding, dilation)
    if min(size) < 1:
        raise ArgumentError(f"x {sizes(x)} is smaller than the kernel {kernel} with dilation {dilation}")
    check_input(x, 1, encoder, groups, residual, (x.shape[0], decoder.shape[0], *size))
    of = groups, stride, padding, dilation, activation
    reason = None if backend == "two-op" else why_not_fused_conv2d(x, encoder, decoder, *of[:4])

    fused = partial(lowrank_conv2d_op, *tensors, *of)
    places: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    two_op = partial(lowrank_conv2d_ref, groups=groups, activation=activation, **places)
    chosen = is_fused(("lowrank_conv2d", *of), backend, reason, tensors, fused, partial(two_op, *tensors))
    if key is not None and chosen is not None:
        return keep_call(key, plan_conv2d_call(tensors, *of) if chosen else two_op)(*tensors)
    return fused() if chosen else two_op(*tensors)


def lowrank_linears(
    x: Tensor,
    encoder: Tensor,
    decoders: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    scales: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """Several low-rank linear layers that read the same x (q/k/v, gate/up), with one encoder call for all of them.

    Args:
        x: (..., c).
        encoder: (sum of ranks, c): the layers' encoders (groups = 1) one after the other.
        decoders: per layer (f_i, rank_i).
        biases: per layer (f_i,) or None.
        scales: of int8 factors, of the rows of the encoder and of every decoder, as of :func:`lowrank_linear`.
        backend: "fused" (CUDA, up to 16 rows, 2 or 3 layers: two launches in all), "two-op" (one encoder call, one
            decoder call a layer) or "auto".

    Returns:
        Per layer (..., f_i).

    Raises:
        ArgumentError, BackendError: as :func:`lowrank_linear`.

    >>> import torch
    >>> [y.shape for y in lowrank_linears(torch.ones(5, 4), torch.ones(3, 4), [torch.ones(6, 2), torch.ones(7, 1)])]
    [torch.Size([5, 6]), torch.Size([5, 7])]
    """
    count = len(decoders)
    biases = [None] * count if biases is None else list(biases)
    check_options(None, backend)
    given = x, encoder, decoders, biases, scales or ()
    options = "lowrank_linears", count, len(biases), scales is None, backend
    key = kind_key(options, (x, encoder, *decoders, *biases, *given[-1]))
    if (call := known_call(key)) is not None:
        return list(call(*given))
    x, encoder, *rest = autocast(x, encoder, *decoders, *biases, *(scales or ()))
    decoders, biases, scale = rest[:count], rest[count : count + len(biases)], rest[count + len(biases) :]
    check_rows(x)
    named = {"encoder": encoder, **{f"decoders[{i}]": d for i, d in enumerate(decoders)}}
    check_dims(2, **named)
    if scales is not None:
        check_int8(x, named, scale)
    ranks = [d.shape[1] for d in decoders]
    if len(biases) != count or count == 0 or sum(ranks) != encoder.shape[0]:
        raise ArgumentError(
            f"{len(biases)} biases and {count} decoders of ranks {ranks} do not fit encoder {sizes(encoder)}"
        )
    for i, (d, part, b) in enumerate(zip(decoders, encoder.split(ranks), biases, strict=True)):
        alike = {} if scale else {"encoder": encoder, f"decoders[{i}]": d}
        check_alike(x, **alike, **{f"biases[{i}]": b})
        check_factors(part, d, b, 1)
    check_input(x, -1, encoder, 1, None, ())
    reason = None if backend == "two-op" else why_not_fused_linears(x, count)
    args = x, encoder, decoders, biases, scale
    present = [b for b in biases if b is not None]
    fused = partial(lowrank_linears_op, x, encoder, decoders, present, [b is not None for b in biases], scale)
    two_op = partial(merged_linear_calls, *args)
    tensors = [x, encoder, *decoders, *biases, *scale]
    chosen = is_fused(("lowrank_linears",), backend, reason, tensors, fused, two_op)
    if key is not None and chosen is not None:
        return list(keep_call(key, plan_linears_call(*args) if chosen else merged_linear_calls)(*args))
    return list(fused() if chosen else two_op())
