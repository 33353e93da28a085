"""Kernels compiled ahead in other processes, for a device that these processes do not touch.

A launch on tensors without data, with Triton's launcher told to compile only, asks for the very code that the launch on
the device will ask for; it is then found in Triton's own cache. Processes are started anew: a fork of one that has a
CUDA context could not compile.
"""

from __future__ import annotations

import concurrent.futures
import copy
import logging
import multiprocessing
import os
import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..kernels import LaunchKey, Tiling, compiling_for, using
from ..measurement import InputSpec
from ..progress import Progress
from .rates import Rates

_LOG = logging.getLogger(__name__)
MOST_PROCESSES = 16
META = torch.device("meta")


class Compilation(NamedTuple):
    """A call of a module (pickled, on the device "meta"), one of whose launches takes a tiling."""

    module: bytes
    spec: InputSpec
    key: LaunchKey
    tiling: Tiling


def without_data(module: nn.Module) -> bytes | None:
    """A pickled copy without data; None for a module that cannot be pickled: its kernels compile where they run."""
    try:
        return pickle.dumps(_on_meta(module))
    except (pickle.PicklingError, TypeError, AttributeError):
        return None


def _on_meta(module: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for t in (*module.parameters(), *module.buffers()):
        empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=META)
        memo[id(t)] = nn.Parameter(empty, False) if isinstance(t, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def compile_ahead(
    work: Sequence[Compilation], rates: Rates, told: Progress, processes: int | None = None
) -> dict[tuple[LaunchKey, Tiling], str]:
    """Fill Triton's cache; by key and tiling what takes more shared memory than there is, and needs no launch.

    What does not compile here is told to the logger: the launch on the device decides.
    """
    count = min(processes or os.cpu_count() or 1, MOST_PROCESSES, len(work))
    faults: dict[tuple[LaunchKey, Tiling], str] = {}
    if count == 0:
        return faults
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(count, context, _begin, (rates.capability,)) as pool:
        waiting = {pool.submit(_compile, one, rates.capability): one for one in work}
        for done, future in enumerate(concurrent.futures.as_completed(waiting), 1):
            one, (shared, error) = waiting[future], future.result()
            if error:
                _LOG.info("%s of %s is not compiled ahead: %s", one.tiling, one.key, error)
            if shared > rates.shared_limit:
                faults[one.key, one.tiling] = f"takes {shared} bytes of shared memory, {rates.shared_limit} are there"
            told("kernels compiled", done, len(work))
    return faults


class _NoDevice:
    """Triton's driver of a device that is not there: enough of it to compile."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _begin(capability: tuple[int, int]) -> None:
    """In a new process: Triton compiles for that device, and launches nothing."""
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    driver.set_active(_NoDevice(GPUTarget("cuda", capability[0] * 10 + capability[1], 32)))
    launch = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(kernel, *args, grid=grid, warmup=True, **options)
        _taken.append(compiled.metadata.shared)
        return compiled

    JITFunction.run = compile_only


_taken: list[int] = []  # shared memory of what this process has compiled


def _compile(one: Compilation, capability: tuple[int, int]) -> tuple[int, str]:
    """(bytes of shared memory of the launch that takes the most, what went wrong)."""
    _taken.clear()
    with compiling_for(capability), using(META, {one.key: one.tiling}), torch.no_grad():
        try:
            one.spec.caller(pickle.loads(one.module), _empty(one.spec))()
        except Exception as e:  # whatever the compiler refuses a tiling with
            return 0, f"{type(e).__name__}: {e}"[:300]
    return max(_taken, default=0), ""


def _empty(spec: InputSpec) -> torch.Tensor:
    x = torch.empty(spec.shape, dtype=spec.dtype, device=META)
    if not spec.channels_last:
        return x
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
