"""What the operators share: the device of a launch, rows of a tensor, what a backward pass needs."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..import_hooks import when_imported


@functools.cache
def triton_module(name: str) -> ModuleType:
    """The module ``fused.NAME``, imported when a kernel first runs: only these modules need triton."""
    return importlib.import_module(f".fused.{name}", __package__)


def flop_formula(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Tell torch's counter, once it is imported (it imports triton), how ``torch.ops.alds_fast.NAME`` counts."""

    def decorate(formula: Callable[..., int]) -> Callable[..., int]:
        def register() -> None:
            counter = sys.modules["torch.utils.flop_counter"]
            counter.register_flop_formula(getattr(torch.ops.alds_fast, name))(formula)

        when_imported("torch.utils.flop_counter", register)
        return formula

    return decorate


def on_device_of(x: Tensor) -> Any:
    """Triton launches on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def rows_of(x: Tensor) -> Tensor:
    """x (..., c) as (m, c) with unit stride along the channels; a copy only where that is not a view."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 and rows.stride(0) >= 0 else rows.contiguous()


def save_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Keep x, encoder, decoder, bias and residual for the backward pass, and the options that follow them."""
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def decoder_output(z: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """z plus bias and residual, which may be None."""
    z = z if bias is None else z + bias
    return z if residual is None else z + residual
