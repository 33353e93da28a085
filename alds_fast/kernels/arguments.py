"""Checks of the kernels' arguments, once, at the boundary; every refusal is an ArgumentError with the values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError
from .reference import ACTIVATIONS

BACKENDS = ("auto", "fused", "fused-first", "two-op")


def sizes(t: Tensor) -> str:
    """The shape in round brackets."""
    return f"{tuple(t.shape)}"


def check_rows(x: Tensor) -> None:
    """x has at least one dimension."""
    if x.dim() == 0:
        raise ArgumentError("x has no dimensions, expected (..., channels)")


def check_dims(dims: int, **tensors: Tensor) -> None:
    """The named tensors have so many dimensions."""
    for name, t in tensors.items():
        if t.dim() != dims:
            raise ArgumentError(f"{name} has shape {sizes(t)}, expected {dims} dimensions")


def check_options(activation: str | None, backend: str) -> None:
    """Both are known names."""
    if backend not in BACKENDS:
        raise ArgumentError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ArgumentError(f"activation={activation!r} is not None or one of {', '.join(ACTIVATIONS)}")


def check_alike(x: Tensor, **tensors: Tensor | None) -> None:
    """The named tensors are on the device of x and of its type."""
    for name, t in tensors.items():
        if t is None:
            continue
        if t.device != x.device:
            raise ArgumentError(f"{name} is on {t.device}, x on {x.device}; move one of them")
        if t.dtype != x.dtype:
            raise ArgumentError(f"{name} is {t.dtype}, x is {x.dtype}; convert one of them")


def check_int8(x: Tensor, factors: Mapping[str, Tensor], scales: Sequence[Tensor]) -> None:
    """The factors are int8 on the device of x, and have a scale for each of their rows in its type."""
    if len(scales) != len(factors):
        raise ArgumentError(f"scales= are {len(scales)} tensors, expected those of the rows of {', '.join(factors)}")
    for (name, factor), scale in zip(factors.items(), scales, strict=True):
        if factor.dtype != torch.int8 or factor.device != x.device:
            raise ArgumentError(
                f"{name} is {factor.dtype} on {factor.device}: with scales= it is torch.int8 on the device of x, "
                f"{x.device}"
            )
        if tuple(scale.shape) != (factor.shape[0],):
            raise ArgumentError(
                f"the scales of {name} {sizes(factor)} have shape {sizes(scale)}, one a row is expected"
            )
        check_alike(x, **{f"the scales of {name}": scale})


def check_factors(encoder: Tensor, decoder: Tensor, bias: Tensor | None, groups: int, outputs: int = 0) -> None:
    """encoder (groups * rank, ...), decoder (f, groups * rank, ...) and bias (f,), or (outputs,), fit each other."""
    q, f = encoder.shape[0], decoder.shape[0]
    if not encoder.shape[1] or not f:
        raise ArgumentError(f"encoder {sizes(encoder)} and decoder {sizes(decoder)} must not be empty")
    if not isinstance(groups, int) or groups < 1 or q % groups or q == 0:
        raise ArgumentError(f"groups={groups!r} does not divide the {q} rows of encoder {sizes(encoder)}")
    if decoder.shape[1] != q:
        raise ArgumentError(f"decoder {sizes(decoder)} takes {decoder.shape[1]} hidden values, the encoder gives {q}")
    if bias is not None and tuple(bias.shape) != (outputs or f,):
        raise ArgumentError(f"bias has shape {sizes(bias)}, decoder {sizes(decoder)} needs ({outputs or f},)")


def check_input(
    x: Tensor, axis: int, encoder: Tensor, groups: int, residual: Tensor | None, output: Sequence[int]
) -> None:
    """x has the encoder's channels, residual the output's shape."""
    wanted = encoder.shape[1] * groups
    if x.shape[axis] != wanted:
        raise ArgumentError(
            f"x {sizes(x)} has {x.shape[axis]} channels, encoder {sizes(encoder)} with groups={groups} takes {wanted}"
        )
    if residual is not None and tuple(residual.shape) != tuple(output):
        raise ArgumentError(f"residual has shape {sizes(residual)}, the output {tuple(output)}")


def pair(value: int | Sequence[int], name: str, least: int) -> tuple[int, int]:
    """An integer, or two, of at least ``least``, as two."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or not all(isinstance(v, int) and v >= least for v in both):
        raise ArgumentError(f"{name}={value!r}: expected an integer >= {least} or two of them")
    return both
