"""A process that compiles: pickled compilations from standard input, a line of JSON for each on standard output."""

from __future__ import annotations

import json
import os
import pickle
import sys
from typing import Any

import torch

from ..kernels import compiling_for, using
from ..measurement import InputSpec
from .compilation import META, Compilation

_taken: list[int] = []  # shared memory of what was compiled last


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


def compile_only(capability: tuple[int, int]) -> None:
    """From here on Triton compiles for that device, and launches nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    driver.set_active(_NoDevice(GPUTarget("cuda", capability[0] * 10 + capability[1], 32)))
    launch = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(kernel, *args, grid=grid, warmup=True, **options)
        _taken.append(compiled.metadata.shared)
        return compiled

    JITFunction.run = run


def compile_one(one: Compilation, capability: tuple[int, int]) -> tuple[int, str]:
    """(bytes of shared memory of the launch that takes the most, what went wrong)."""
    _taken.clear()
    torch.backends.cuda.matmul.fp32_precision = one.key.precision
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


def answer_compilations() -> None:
    """Until standard input ends."""
    capability = int(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print is no answer
    torch.set_num_threads(1)
    compile_only(capability)
    while True:
        try:
            one = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        print(json.dumps(compile_one(one, capability)), file=answers, flush=True)


if __name__ == "__main__":
    answer_compilations()
