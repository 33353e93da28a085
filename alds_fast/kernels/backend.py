"""Which backend runs: whether the fused kernel can, and, for "auto", which one was measured to be faster."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import BackendError
from .limits import LEAST_SAVED, MAX_HIDDEN, MAX_MERGED, MAX_ROWS, most_saved, precision, why_no_walk
from .tilings import capability_of

HAS_TRITON = importlib.util.find_spec("triton") is not None
FUSED_TYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERPRETER_TYPES = [torch.float16, torch.float32]  # its bfloat16 products are wrong; the tests mend that
# asked once, as torch.compile cannot trace the question on torch 2.11
AUTOCAST_KINDS = tuple(k for k in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(k))
_decisions: dict[tuple, dict[str, Any]] = {}


def decisions() -> list[dict[str, Any]]:
    """What ``backend="auto"`` has measured in this process: operation, shapes, milliseconds of both, and the winner."""
    return [dict(decision) for decision in _decisions.values()]


def _is_interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _device_reason(kind: str, index: int | None) -> str | None:
    if not HAS_TRITON:
        return "triton is not installed (pip install triton)"
    if kind == "cpu":
        return None if _is_interpreted() else "it runs on CUDA devices, x is on the CPU"
    if kind == "meta" and capability_of(torch.device("meta")) is not None:  # it is to be compiled only
        return None
    if kind != "cuda" or not torch.cuda.is_available():
        return f"it runs on CUDA devices, x is on {kind}"
    major = torch.cuda.get_device_capability(index)[0]
    return None if major >= 8 else f"it needs compute capability 8.0, the device has {major}.x"


# The mark that torch.compiler.assume_constant_result sets; calling that would import torch._dynamo.
_device_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_transformed(x: Tensor) -> bool:
    """Whether forward-mode differentiation or a functorch transform is at work, which the operators do not know."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.is_functorch_wrapped_tensor(x)


def type_reason(x: Tensor) -> str | None:
    """Why no fused kernel can run on x, by its device and type; None if one can."""
    reason = _device_reason(x.device.type, x.device.index)
    if reason is None and x.dtype not in FUSED_TYPES:
        return f"it takes float16, bfloat16 and float32, x is {x.dtype}"
    if reason is None and x.device.type == "cpu" and x.dtype not in INTERPRETER_TYPES:
        return "triton's interpreter multiplies bfloat16 wrongly"
    if reason is None and is_transformed(x):
        return "it knows no forward-mode differentiation and no functorch transforms"
    return reason


def why_not_fused_linear(x: Tensor, encoder: Tensor) -> str | None:
    """Why the fused linear kernel cannot run for these arguments; None if it can."""
    reason = type_reason(x)
    if reason is None and encoder.shape[0] > MAX_HIDDEN and x.numel() > MAX_ROWS * x.shape[-1]:
        return f"groups * rank = {encoder.shape[0]} is above {MAX_HIDDEN} with more than {MAX_ROWS} rows"
    return reason


def why_not_fused_linears(x: Tensor, layers: int) -> str | None:
    """Why the fused kernels cannot run so many merged linear layers; None if they can."""
    reason = type_reason(x)
    if reason is None and x.numel() > MAX_ROWS * x.shape[-1]:
        return f"merged layers take up to {MAX_ROWS} rows, x is {tuple(x.shape)}"
    if reason is None and layers > MAX_MERGED:
        return f"up to {MAX_MERGED} layers are merged, got {layers}"
    return reason


def why_not_fused_conv2d(
    x: Tensor, encoder: Tensor, decoder: Tensor, groups: int, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> str | None:  # fmt: skip
    """Why the fused convolutions cannot run for these arguments; None if one can."""
    if x.shape[1:].numel() >= 2**31:
        return f"one image of x {tuple(x.shape)} has 2^31 elements or more"
    if decoder.shape[2:].numel() == 1:
        return type_reason(x)
    if encoder.shape[2:].numel() > 1:
        return "encoder and decoder both have a kernel (schemes 1 and 2 run as two calls)"
    options = stride, padding, dilation
    return type_reason(x) or why_no_walk(x.shape[-1], x.dtype, encoder.shape, decoder.shape, groups, options)


def _time_ms(call: Callable[[], Tensor]) -> float:
    """Milliseconds of a call on the current CUDA stream: the least mean of three runs of ten."""
    call()
    times = []
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(10):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 10)
    return min(times)


def _can_measure(x: Tensor) -> bool:
    """Only plain tensors have a time: no fake ones, no subclasses."""
    return x.is_cuda and type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _measure(about: dict[str, Any], x: Tensor, fused: Callable[[], Any], two_op: Callable[[], Any]) -> dict[str, Any]:
    """Times of both and the winner; a kernel that the device refuses has lost, with the reason."""
    with _disable_current_modes(), torch.cuda.device(x.device if x.is_cuda else -1):
        two_op_ms = _time_ms(two_op)
        try:
            fused_ms = _time_ms(fused)
        except Exception as e:  # what the compiler or the driver says, for example that shared memory is too small
            return {**about, "fused_ms": None, "two_op_ms": two_op_ms, "ran": "two-op", "note": f"fused failed: {e}"}
    ran = "fused" if fused_ms < two_op_ms else "two-op"
    return {**about, "fused_ms": fused_ms, "two_op_ms": two_op_ms, "ran": ran}


def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device) if device.type == "cuda" else None


def _why_not_timed(x: Tensor, encoder: Tensor, decoder: Tensor) -> str | None:
    """Why two calls run at once: what fusing saves at most is less than what a fused product loses."""
    channels = x.shape[1] if x.dim() == 4 and encoder.dim() == 4 else x.shape[-1]
    if x.numel() <= MAX_ROWS * channels or x.dtype == torch.float32:
        return None
    saved = most_saved(_properties(x.device), encoder.shape[1:].numel(), decoder.numel() // decoder.shape[1])
    if saved is None or saved >= LEAST_SAVED:
        return None
    return f"not timed: fusing saves at most {saved:.0%} of the products' time"


def _auto(key: tuple, tensors: Sequence[Any], fused: Callable[[], Any], two_op: Callable[[], Any]) -> bool | None:
    """Whether fused is the faster one, by measurement where that is possible; None where it will be and is not yet.

    Row counts of linear layers that round up to the same power of two share a measurement.
    """
    x = tensors[0]
    if not _can_measure(x) or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return False
    shapes = [None if t is None else tuple(t.shape) for t in tensors]
    rows = 1 << (x.numel() // max(1, x.shape[-1]) - 1).bit_length()
    inputs = (shapes[0], x.stride()) if "conv2d" in key[0] else (rows, x.stride(-1) == 1)
    weights = shapes[1:] if key[0] == "lowrank_linears" else shapes[1:3]
    key = (*key, inputs, *weights, *(t is None for t in tensors), x.dtype, x.device, precision())
    if key not in _decisions:
        about = {"op": key[0], "shapes": shapes, "dtype": str(x.dtype), "device": str(x.device)}
        if (why := _why_not_timed(x, tensors[1], tensors[2])) is not None:
            _decisions[key] = {**about, "fused_ms": None, "two_op_ms": None, "ran": "two-op", "note": why}
        elif x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        else:
            _decisions[key] = _measure(about, x, fused, two_op)
    return bool(_decisions[key]["ran"] == "fused")


def autocast(x: Any, *tensors: Any) -> list[Any]:
    """The tensors (or None) as the library calls would see them under torch.autocast."""
    kind = x.device.type
    if kind not in AUTOCAST_KINDS or not torch.is_autocast_enabled(kind):
        return [x, *tensors]
    dtype, kept = torch.get_autocast_dtype(kind), (None, torch.float64)
    return [t if t is None or t.dtype in kept or not t.is_floating_point() else t.to(dtype) for t in (x, *tensors)]


def is_fused(
    key: tuple, backend: str, reason: str | None, tensors: Sequence[Tensor | None], fused: Callable[[], Any],
    two_op: Callable[[], Any],
) -> bool | None:  # fmt: skip
    """Whether fused is to run; None where two calls do this time only. ``reason`` says why fused cannot, or is None."""
    if backend == "fused" and reason is not None:
        raise BackendError(f"backend='fused' cannot run {key[0]} here: {reason}; use 'two-op' or 'auto'")
    if reason is not None or backend == "two-op":
        return False
    return backend in ("fused", "fused-first") or _auto(key, tensors, fused, two_op)
