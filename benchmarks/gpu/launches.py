"""Compile the kernels exactly as they are launched for some layers, without a GPU; run as a script.

The layers stand for all that there is: every kernel and epilogue, 1 to 8 parts of an encoder, sizes that are multiples
of 16 and not. Launches are recorded on tensors without data, and specialised as Triton's launcher does. Prints one JSON
row per kernel and architecture, as aot.py does.
"""

import json
import os
import sys
from contextlib import contextmanager
from unittest import mock

import torch

from .aot import SHOWN, compiled, counted

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int8: "*i8"}
TOLD = (*SHOWN, "GROUPS", "CHUNKS", "KW", "SIZE", "HAS_RESIDUAL", "ACTIVATION", "HAS_SCALE")


def empty(*shape, dtype=torch.bfloat16):
    """A tensor without data; convolutions' are channels last."""
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t


def convolution(images, side, channels, filters, hidden, groups=1, activation="relu", residual=False, width=3):
    """Launch a convolution of stride 1 with a bias, which keeps the size."""
    from alds_fast.kernels.fused import conv2d

    x, y = (empty(images, n, side, side) for n in (channels, filters))
    factors = empty(hidden, channels // groups, width, width), empty(filters, hidden, 1, 1)
    added, ones, padding = y if residual else None, (1, 1), (width // 2,) * 2
    bias = empty(filters)
    launch = conv2d.plan_conv2d(x, *factors, bias, added, groups, ones, padding, ones, activation, (side, side))
    launch(x, *factors, bias, added, y)


def walk(images, side, channels, filters, hidden, activation="relu", residual=False):
    """Launch a 1 x 1 encoder with a 3 x 3 decoder and a bias."""
    from alds_fast.kernels.fused import conv2d_walk

    x, y, bias = empty(images, channels, side, side), empty(images, filters, side, side), empty(filters)
    tensors = x, empty(hidden, channels, 1, 1), empty(filters, hidden, 3, 3), bias, y if residual else None
    conv2d_walk.plan_conv2d_walk(*tensors, activation)(*tensors, y)


def linear(rows, channels, filters, hidden, groups=1, activation=None, bias=True, residual=False, pivots=False,
           dtype=torch.bfloat16, int8=False):  # fmt: skip
    """Launch a linear layer, with int8 factors in bf16 or none."""
    from alds_fast.kernels.fused import linear

    shapes = (rows, channels), (hidden, channels // groups), (filters - hidden * pivots, hidden), (filters,)
    stored = dtype, *(torch.int8 if int8 else dtype,) * 2, dtype
    x, encoder, decoder, b = (empty(*shape, dtype=kind) for shape, kind in zip(shapes, stored, strict=True))
    scales = (empty(hidden), empty(len(decoder))) if int8 else ()
    y = empty(rows, filters, dtype=dtype)
    outputs = empty(filters, dtype=torch.int32) if pivots else None
    added = b if bias else None, y if residual else None
    run = linear.plan_linear(x, encoder, decoder, *added, groups, activation, outputs, scales)
    run(x, encoder, decoder, *added, outputs, scales, y)


def merged(rows, channels, filters, rank):
    """Launch three linear layers of one x."""
    from alds_fast.kernels.fused import few_rows

    decoders, ys = ([empty(*shape) for _ in range(3)] for shape in ((filters, rank), (rows, filters)))
    tensors = empty(rows, channels), empty(3 * rank, channels), decoders, [None] * 3, None
    few_rows.plan_few_rows(*tensors, 1, None, None, ())(*tensors, None, (), ys)


def first_guess(key):
    """The tiling that a launch takes where nothing was measured."""
    from alds_fast.kernels import ConvKey, EncodeKey, LinearKey
    from alds_fast.kernels.fused import conv2d, conv2d_walk, few_rows, linear, vectors

    if isinstance(key, LinearKey):
        return linear.first_linear(key)
    if isinstance(key, ConvKey):
        walks = key.scheme == 3
        return conv2d_walk.first_walk(key, key.pixels, True) if walks else conv2d.first_conv2d(key, key.pixels)
    if isinstance(key, EncodeKey):
        return (
            vectors.vector_tiling(key.channels, key.rows)
            if key.vectors
            else few_rows.encode_tiling(key.dtype, key.int8)
        )
    many = max(key.ranks)
    return (
        vectors.vector_tiling(many, key.rows, 4)
        if key.vectors
        else few_rows.decode_tiling(key.dtype, key.wide, key.int8)
    )


LAYERS = {  # q hidden values
    "3x3 64 -> 64, 56 x 56, q 16, batch 128": lambda: convolution(128, 56, 64, 64, 16),
    "3x3 64 -> 64, 56 x 56, q 32, batch 128": lambda: convolution(128, 56, 64, 64, 32),
    "3x3 128 -> 128, 28 x 28, q 64, batch 128": lambda: convolution(128, 28, 128, 128, 64),
    "3x3 128 -> 128, 28 x 28, q 64, 4 slices, batch 128": lambda: convolution(128, 28, 128, 128, 64, 4),
    "3x3 256 -> 256, 14 x 14, q 64, batch 128": lambda: convolution(128, 14, 256, 256, 64),
    "3x3 75 -> 90, 20 x 20, q 20, batch 3, residual, SiLU": lambda: convolution(3, 20, 75, 90, 20, 1, "silu", True),
    "5x5 64 -> 64, 28 x 28, q 16, batch 128": lambda: convolution(128, 28, 64, 64, 16, width=5),
    "3x3 64 -> 64, scheme 3, 56 x 56, q 16, batch 128": lambda: walk(128, 56, 64, 64, 16),
    "linear 768 -> 3072, 25216 rows, q 128, GELU": lambda: linear(25216, 768, 3072, 128, activation="gelu"),
    "linear 3072 -> 768, 25216 rows, q 128": lambda: linear(25216, 3072, 768, 128),
    "linear 4096 -> 4096, 2048 rows, q 256, no bias": lambda: linear(2048, 4096, 4096, 256, bias=False),
    "linear 75 -> 90, 99 rows, q 20, residual, SiLU": lambda: linear(99, 75, 90, 20, 1, "silu", residual=True),
    "linear 4096 -> 4096, 1 row, q 1024, no bias": lambda: linear(1, 4096, 4096, 1024, bias=False),
    "linear 4096 -> 4096, 16 rows, q 1024, no bias": lambda: linear(16, 4096, 4096, 1024, bias=False),
    "linear 4096 -> 4096, 1 row, q 1024, no bias, int8": lambda: linear(1, 4096, 4096, 1024, bias=False, int8=True),
    "linear 4096 -> 4096, 16 rows, q 1024, no bias, int8": lambda: linear(16, 4096, 4096, 1024, bias=False, int8=True),
    "q/k/v 4096, 16 rows, q 512": lambda: merged(16, 4096, 4096, 512),
    "linear 4096 -> 512, 16 rows, q 256, output pivots, residual, GELU": lambda: linear(
        16, 4096, 512, 256, 1, "gelu", residual=True, pivots=True
    ),
    "linear 60 -> 203, 5 rows, q 37, ReLU, float32": lambda: linear(
        5, 60, 203, 37, activation="relu", dtype=torch.float32
    ),
}


@contextmanager
def recorded(sm):
    """A list to which launches go as (kernel, arguments by name, options); they are taken for ones of that device."""
    from triton.runtime import JITFunction

    from alds_fast.kernels.fused import conv2d_walk, few_rows

    launches = []

    def record(kernel, *values, grid, warmup, **named):
        names = kernel.arg_names
        arguments = dict(zip(names[: len(values)], values, strict=True))
        arguments |= {name: named.pop(name) for name in names if name in named}
        launches.append((kernel, arguments, named))

    asked = (few_rows, "early_launch"), (conv2d_walk, "has_wgmma")
    early, wgmma = (mock.patch.object(module, name, lambda x: sm >= 90) for module, name in asked)
    with mock.patch.object(JITFunction, "run", record), early, wgmma:
        yield launches


def specialised(kernel, arguments):
    """A source for Triton's compiler: None and 1 become constants, and it is told of multiples of 16."""
    from triton.compiler import ASTSource

    constants = {p.name for p in kernel.params if p.is_constexpr}
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        is_tensor = isinstance(value, torch.Tensor)
        if name in constants or (not is_tensor and value in (None, 1)):
            signature[name], constexprs[(i,)] = "constexpr", value
            continue
        signature[name] = TYPES[value.dtype] if is_tensor else "i32"
        if is_tensor or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes)


def compiled_layers():
    """(row, cubin) of every kernel of every layer, for both architectures."""
    for layer, launch in LAYERS.items():
        for sm in (80, 90):
            with recorded(sm) as launches:
                launch()
            for kernel, arguments, options in launches:
                resources, cubin = compiled(specialised(kernel, arguments), sm, options)
                told = {k: v for k, v in arguments.items() if k in TOLD and (k != "HAS_SCALE" or v)}
                name = kernel.__name__.strip("_").removesuffix("_kernel").removeprefix("lowrank_")
                made = {"warps": options["num_warps"], "stages": options["num_stages"], "sm": sm}
                yield {"layer": layer, "kernel": name, **told, **made, **resources}, cubin


def main():
    print("\n".join(map(json.dumps, counted(list(compiled_layers())))))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
