"""One operation: all ways to compute a case, their times, errors and floor."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from ..measurement import Prepared, copies_for, prepare
from . import cases, timing
from .cases import Operation
from .registered import registered_names

Row = dict[str, Any]
NOT_COMPILED = "not among the rows that are compiled"


class DeviceLost(RuntimeError):
    """Nothing runs on the device any more in this process."""


@dataclass(frozen=True)
class BenchSettings:
    """Where and how long to measure; ``mode`` is torch.compile's for rows, ``model_mode`` that for whole models."""

    device: torch.device
    quick: bool
    rounds: int
    min_ms: float
    mode: dict[str, Any]
    model_mode: dict[str, Any]

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"


def settings(device: str, quick: bool, model_mode: str = "default") -> BenchSettings:
    """Those of a full or a quick run. Graphs are captured here, so compilation makes none of its own."""
    mode, whole = {"mode": "max-autotune-no-cudagraphs" if device == "cuda" else "default"}, {"mode": model_mode}
    if quick and device == "cpu":  # no compiler of machine code, only the way there
        mode = whole = {"backend": "aot_eager"}
    count, min_ms = (3, 0.5) if quick else (15, 2.0)
    return BenchSettings(torch.device(device), quick, count, min_ms, mode, whole)


def compiled(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """torch.compile with a fresh cache, for exactly the sizes seen."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, **options)


def check_device(device: torch.device, cause: BaseException, where: str = "") -> None:
    """DeviceLost if an error has left the device unusable for this process."""
    try:
        timing.synchronize(device)
        torch.ones(1, device=device).item()
    except Exception as e:
        raise DeviceLost(f"{where} {timing.error_text(cause)}".strip()) from e


def interpreted(device: torch.device) -> bool:
    """Whether fused kernels would run under Triton's interpreter."""
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def _rotated(case: Operation, device: torch.device) -> list[cases.Tensors]:
    tensors = cases.make(case, device)
    if case.groups > 1 and case.is_conv:
        tensors["full"] = cases.padded_encoder(tensors["encoder"], case.groups)
    smallest = min(cases.size_bytes(tensors, "x", *n) for n in (("weights",), ("encoder", "decoders")))
    copies = 2 if device.type == "cpu" else copies_for(smallest, device)
    return [tensors] + [cases.copy_of(tensors) for _ in range(copies - 1)]


def _why_refused(call: Callable[[Any], Any], tensors: cases.Tensors, exact: Tensor) -> str | None:
    """Why a user's function is not timed; what it raises goes through."""
    given = cases.copy_of(tensors)
    y = call(given)
    if not isinstance(y, Tensor) or (y.shape, y.dtype, y.device) != (exact.shape, tensors["x"].dtype, exact.device):
        told = f"{tuple(y.shape)} of {y.dtype} on {y.device}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        return f"it returns {told}, expected {tuple(exact.shape)} of {tensors['x'].dtype} on {exact.device}"
    pairs = zip(cases.every_tensor(given), cases.every_tensor(tensors), strict=True)
    return None if all(torch.equal(a, b) for a, b in pairs) else "it changes its inputs"


def _prepared(
    case: Operation, sets: list, exact: list[Tensor], options: BenchSettings, row: Row, compile_it: bool
) -> dict[str, Prepared]:
    """Every side that runs; why the others do not goes to the row."""
    calls, prepared = dict(cases.sides(case)), {}
    if compile_it:
        calls["compiled"] = compiled(cases.two_op(case), options.mode)
    else:
        row["reasons"]["compiled"] = "no time left" if case.compiled else NOT_COMPILED
    for name, call in calls.items():
        try:
            why = _why_refused(call, sets[0], exact[0]) if name in registered_names() else None
            if why is not None:
                row["reasons"][name] = why
                continue
            prepared[name] = prepare(call, sets, options.device)
        except BackendError as e:
            row["reasons"][name] = str(e)
        except Exception as e:
            check_device(options.device, e, f"{name}:")
            row["reasons"][name] = row["error"] = f"{name}: {timing.error_text(e)}"
    return prepared


def relative_error(results: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative Frobenius error of several results; NaN if one has NaN."""
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(results, exact, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _exact(case: Operation, tensors: cases.Tensors) -> list[Tensor]:
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        return cases.exact_result(case, tensors)
    finally:
        torch.backends.cudnn.benchmark = benchmark


def _check(exact: list[Tensor], prepared: dict[str, Prepared], options: BenchSettings, row: Row) -> None:
    """Errors of every side against float64, of outputs that were poisoned before; the rule is that of the tests."""
    for name, side in prepared.items():
        pairs = timing.poisoned(side, options.device)
        row["errors"][name] = worst = max(
            (relative_error(y, exact) for y in pairs), key=lambda e: math.inf if e != e else e
        )
        if not math.isfinite(worst):
            row["errors"][name] = str(worst)
    ours = [row["errors"][n] for n in ("two_op", "fused") if n in row["errors"]]
    row["max_error"] = max(ours) if ours and all(isinstance(e, float) for e in ours) else None
    row["errors_ok"] = _errors_ok(row["errors"])


def _errors_ok(errors: dict[str, Any]) -> bool:
    """Every side of kernels, users' too, is within twice the error of two calls, and nothing is NaN or infinite."""
    if any(isinstance(e, str) for e in errors.values()):
        return False
    kernels = errors.keys() - {"dense", "two_op", "compiled"}
    return "two_op" not in errors or all(errors[n] <= 2 * errors["two_op"] for n in kernels)


def _roofline(case: Operation, tensors: cases.Tensors, ceilings: dict[str, Any] | None) -> float | None:
    if not ceilings or not ceilings.get("copy_bytes_per_s"):
        return None
    return floor_ms(cases.roofline_bytes(case, tensors), case.flops()[1], ceilings)


def floor_ms(size: int, flops: int, ceilings: dict[str, Any]) -> float:
    """Milliseconds that so many bytes or operations take at best."""
    rate = next(value for name, value in ceilings.items() if name.endswith("_flops_per_s"))
    return 1e3 * max(size / ceilings["copy_bytes_per_s"], flops / rate)


def _fill(row: Row, times: dict[str, dict[str, Any]]) -> None:
    """Milliseconds of every side, and the fastest of the three that deploy chooses from."""
    for name, t in times.items():
        row[f"{name}_ms"] = t["ms"]
        row["quantiles"][name] = [t["q20"], t["q80"]]
        row["gains"][name] = list(t["gain"])
    choices = {n: times[n]["ms"] for n in ("dense", "two_op", "fused") if n in times}
    if choices:
        row["deployed"] = min(choices, key=lambda name: choices[name])
        row["deployed_ms"] = choices[row["deployed"]]


@torch.no_grad()
def measure(case: Operation, options: BenchSettings, ceilings: dict[str, Any] | None, compile_it: bool = False) -> Row:
    """The row of a case; what fails in it is in its "error" and "reasons". Raises DeviceLost."""
    row = case.describe()
    try:
        sets = _rotated(case, options.device)
        row["copies"], row["interpreted"] = len(sets), interpreted(options.device)
        row["roofline_ms"] = _roofline(case, sets[0], ceilings)
        exact = _exact(case, sets[0])
        prepared = _prepared(case, sets, exact, options, row, compile_it)
        _check(exact, prepared, options, row)
        _fill(row, timing.interleaved(prepared, options.device, options.rounds, options.min_ms))
    except DeviceLost:
        raise
    except Exception as e:
        check_device(options.device, e)
        row["error"] = timing.error_text(e)
    return row
