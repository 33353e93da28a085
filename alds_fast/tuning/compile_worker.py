"""A process that compiles: pickled compilations from standard input, a line of JSON for each on standard output."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from typing import Any

import torch

from ..kernels import ConvKey, DecodeKey, EncodeKey, LinearKey, compiling_for, using
from ..measurement import InputSpec
from .compilation import META, Compilation

KERNEL_OF = {EncodeKey: "encode", DecodeKey: "decode", LinearKey: "linear", ConvKey: "conv2d"}  # its name has this
_compiled: list[tuple[str, Any]] = []  # by the name of the kernel


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
        _compiled.append((kernel.__name__, compiled))
        return compiled

    JITFunction.run = run


def compile_one(one: Compilation, capability: tuple[int, int]) -> tuple[int, int, str]:
    """(bytes of shared memory, bytes that spill of the launch that takes the tiling, what went wrong)."""
    _compiled.clear()
    torch.backends.cuda.matmul.fp32_precision = one.key.precision
    with compiling_for(capability), using(META, {one.key: one.tiling}), torch.no_grad():
        try:
            one.spec.caller(pickle.loads(one.module), _empty(one.spec))()
        except Exception as e:  # whatever the compiler refuses a tiling with
            return 0, 0, f"{type(e).__name__}: {e}"[:300]
    kernels = [kernel for name, kernel in _compiled if KERNEL_OF[type(one.key)] in name]
    shared, spilled = (max(map(f, kernels), default=0) for f in (lambda k: int(k.metadata.shared), spilled_bytes))
    return shared, spilled, ""


def spilled_bytes(kernel: Any) -> int:
    """Of a thread of a compiled kernel, by the tool that comes with Triton; 0 where that cannot be asked."""
    from triton import knobs

    try:
        cubin = next(path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
        told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    except Exception:  # no such tool, or files kept elsewhere: the times decide
        return 0
    return sum(map(int, re.findall(r"\b(?:STACK|LOCAL):(\d+)", told)))


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
