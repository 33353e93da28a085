"""What Triton's launcher and a later launch hand to compiled kernels, without a GPU; run as a script.

Kernels are compiled for compute capability 9.0 and not loaded. Prints a line for every launch: the kernel, and its grid
and arguments as the first call gave them, and as the second one did.
"""

import json

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from alds_fast.kernels import compiling_for
from alds_fast.kernels.fused import conv2d, conv2d_walk, few_rows, launching, linear
from alds_fast.tuning.compile_worker import _NoDevice
from benchmarks.gpu.launches import empty

HANDED = []


def told(value):
    """Tensors by type and shape."""
    return [str(value.dtype), list(value.shape)] if isinstance(value, torch.Tensor) else value


def take(x, y, z, stream, function, packed_metadata, launch_metadata, on_enter, on_exit, *values):
    """In the place of a launch."""
    HANDED.append([[x, y, z], [told(v) for v in values]])


def linear_layer(rows, channels, filters, hidden, bias, residual, pivots):
    """A plan, and the tensors for it."""
    y = empty(rows, filters)
    tensors = empty(rows, channels), empty(hidden, channels), empty(filters - hidden * pivots, hidden)
    tensors += (empty(filters) if bias else None, y if residual else None)
    outputs = empty(filters, dtype=torch.int32) if pivots else None
    return linear.plan_linear(*tensors, 1, "gelu", outputs), (*tensors, outputs, (), y)


def merged_layers(rows):
    """Three decoders of one encoder."""
    tensors = empty(rows, 96), empty(48, 96), [empty(64, 16)] * 3, [empty(64), None, None], None
    return few_rows.plan_few_rows(*tensors, 1, None, None, ()), (*tensors, None, (), [empty(rows, 64)] * 3)


def convolution(width, stride):
    """By rows of taps, or by taps."""
    tensors = empty(2, 32, 12, 12), empty(16, 32, width, width), empty(48, 16, 1, 1), empty(48), None
    size = (12 // stride,) * 2
    of = 1, (stride,) * 2, (width // 2,) * 2, (1, 1), "relu", size
    return conv2d.plan_conv2d(*tensors, *of), (*tensors, empty(2, 48, *size))


def walk():
    """A 1 x 1 encoder, a 3 x 3 decoder."""
    tensors = empty(2, 32, 12, 12), empty(16, 32, 1, 1), empty(48, 16, 3, 3), empty(48), None
    return conv2d_walk.plan_conv2d_walk(*tensors, "relu"), (*tensors, empty(2, 48, 12, 12))


PLANS = {
    "tiles": lambda: linear_layer(100, 96, 64, 16, True, True, False),
    "pivots": lambda: linear_layer(64, 96, 64, 16, False, False, True),
    "one row": lambda: linear_layer(1, 96, 64, 16, True, False, False),
    "one channel more": lambda: linear_layer(1, 97, 64, 16, True, False, False),
    "parts": lambda: linear_layer(5, 4096, 64, 16, True, True, False),
    "merged": lambda: merged_layers(4),
    "rows of taps": lambda: convolution(3, 1),
    "taps": lambda: convolution(3, 2),
    "walk": walk,
}


def main():
    driver.set_active(_NoDevice(GPUTarget("cuda", 90, 32)))
    CompiledKernel._init_handles = lambda self: None
    CompiledKernel.run = staticmethod(take)
    CompiledKernel.launch_metadata = lambda self, *args: None
    launching.is_on_device = lambda tensors: True
    with compiling_for((9, 0)):
        for name, make in PLANS.items():
            plan, tensors = make()
            calls = []
            for _ in range(2):
                HANDED.clear()
                plan(*tensors)
                calls.append(list(HANDED))
            print(json.dumps([name, *calls]))


if __name__ == "__main__":
    main()
