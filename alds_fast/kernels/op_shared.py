"""What the operators share: the device of a launch, rows of a tensor, what a backward pass needs."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..import_hooks import when_imported

PLAIN = (Tensor, torch.nn.Parameter)
FORMAT = torch.contiguous_format
_OPERATORS = torch.library.Library("alds_fast", "FRAGMENT")


def as_operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """The function as ``torch.ops.alds_fast.NAME`` on CPU and CUDA, which mutates nothing and returns new tensors.

    What is returned calls it, or the function itself where nobody but the kernel has to know of the call: the
    dispatcher takes 10 us of a CPU, ``torch.library.custom_op`` 3 more.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        _OPERATORS.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            _OPERATORS.impl(name, function, key)
        registered = getattr(torch.ops.alds_fast, name).default

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return function(*args) if _is_plain_call(args) else registered(*args)

        return call

    return decorate


def is_watched() -> bool:
    """Whether a mode, tracer, profiler, functorch transform or forward-mode differentiation is at work."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd._profiler_enabled():
        return True
    return forward_ad._current_level >= 0


def holds_values(t: Any) -> TypeGuard[Tensor]:
    """Whether values lie where the tensor points to: no subclass, nothing sparse, no sign that is to be applied yet."""
    return type(t) in PLAIN and t.layout is torch.strided and not t.is_neg()


def _is_plain_call(args: Sequence[Any]) -> bool:
    """Whether nothing watches, and no gradient or subclass of tensors is at work."""
    if is_watched():
        return False
    graded = torch.is_grad_enabled()
    for t in args:
        if isinstance(t, Tensor) and (not holds_values(t) or (graded and t.requires_grad)):
            return False
        if isinstance(t, list) and not _is_plain_call(t):
            return False
    return True


def without_values(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The function makes an operator's outputs without values."""
    decorate: Callable[[Callable[..., Any]], Callable[..., Any]]
    decorate = torch.library.register_fake(f"alds_fast::{name}", lib=_OPERATORS)
    return decorate


def differentiated_by(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """How an operator is differentiated."""
    torch.library.register_autograd(f"alds_fast::{name}", backward, setup_context=setup, lib=_OPERATORS)


@functools.cache
def triton_module(name: str) -> ModuleType:
    """The module ``fused.NAME``, imported when a kernel first runs: only these modules need triton."""
    return importlib.import_module(f".fused.{name}", __package__)


def counters_given_back(device: torch.device) -> AbstractContextManager[None]:
    """Graphs captured meanwhile leave the device's counters to others: they never run at the same time as these."""
    given_back: AbstractContextManager[None] = triton_module("tickets").given_back(device)
    return given_back


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


def rows_view(x: Tensor) -> Tensor | None:
    """What :func:`rows_of` gives where that is no copy; x has elements."""
    try:
        rows = x.view(-1, x.shape[-1])
    except RuntimeError:
        return None
    return rows if rows.stride(1) == 1 and rows.stride(0) >= 0 else None


def rows_like(x: Tensor) -> Tensor:
    """Rows that lie as those of :func:`rows_of`, with its values only where it copies nothing."""
    rows = rows_view(x)
    return x.new_empty((x.numel() // x.shape[-1], x.shape[-1])) if rows is None else rows


def contiguous_like(*tensors: Tensor | None, memory_format: torch.memory_format = FORMAT) -> list[Tensor | None]:
    """Tensors that lie as those of :func:`contiguous`, with their values only where it copies nothing."""
    return [
        t
        if t is None or t.is_contiguous(memory_format=memory_format)
        else torch.empty_like(t, memory_format=memory_format)
        for t in tensors
    ]


def contiguous(*tensors: Tensor | None, memory_format: torch.memory_format = FORMAT) -> list[Tensor | None]:
    """The tensors, copied where they do not lie so."""
    return [None if t is None else t.contiguous(memory_format=memory_format) for t in tensors]


def are_contiguous(*tensors: Tensor | None, memory_format: torch.memory_format = FORMAT) -> bool:
    """Whether :func:`contiguous` has nothing to copy."""
    return all(t is None or t.is_contiguous(memory_format=memory_format) for t in tensors)


def save_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Keep x, encoder, decoder, bias and residual for the backward pass, and the options that follow them."""
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def decoder_output(z: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """z plus bias and residual, which may be None."""
    z = z if bias is None else z + bias
    return z if residual is None else z + residual
