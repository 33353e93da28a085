"""Compile every configuration that the launchers can choose for sm_80 and sm_90, without a GPU; run as a script.

Prints one JSON row per compilation: kernel, dtype, tiles, architecture, registers, spilled bytes, shared bytes. The
widest epilogue is compiled (bias, residual, GELU). "wide" configurations are for channels, ranks and filters that are
multiples of 16, the others for any.
"""

import concurrent.futures
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile

import torch

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may use, CUDA C++ programming guide, table of features
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


def configurations():
    """(kernel name, dtype, constants, tiling, whether sizes are multiples of 16) of everything that is reachable."""
    from alds_fast.kernels import triton_conv2d, triton_few_rows, triton_linear

    sizes = [16, 32, 64, 128, 256, 512]
    for kind, wide in itertools.product(TYPES, (True, False)):
        dtype = TYPES[kind]
        for hidden in [s for s in sizes if s <= triton_linear.MAX_HIDDEN]:
            t = triton_linear.tile_tiling(hidden, dtype, wide)
            tiles = {"BM": t.rows, "BK": t.reduction, "BQ": hidden, "BF": t.cols}
            for one in (True, False):
                yield "linear", kind, {**tiles, "ONE_SLICE": one, "HAS_BIAS": True, "HAS_RESIDUAL": True}, t, wide
        t = triton_few_rows.encode_tiling(dtype)
        yield "encode_rows", kind, {"BM": t.rows, "BK": t.reduction, "BQ": t.cols}, t, wide
        t, biases = triton_few_rows.decode_tiling(dtype, wide), {f"HAS_BIAS{i}": True for i in range(3)}
        for layers, parts in ((1, 1), (1, 8), (2, 8), (3, 8)):
            tiles = {"LAYERS": layers, "PARTS": parts, "BM": t.rows, "BK": t.reduction, "BF": t.cols}
            yield "decode_rows", kind, {**tiles, **biases, "HAS_RESIDUAL": layers == 1}, t, wide
        tilings = {
            (chunk, triton_conv2d.conv_tiling(chunk, filters, dtype, wide))
            for chunk in sizes if chunk <= triton_conv2d.max_chunk(dtype, wide) for filters in sizes
        }  # fmt: skip
        loops = [{"DECODER_TAPS": taps, "GROUPS": n, "CHUNKS": n} for taps, n in ((False, 1), (False, 2), (True, 2))]
        for (chunk, t), loop in itertools.product(sorted(tilings), loops):
            kernel = {"KH": 3, "KW": 3, **loop}
            place = {"SH": 1, "SW": 1, "PH": 1, "PW": 1, "DH": 1, "DW": 1}
            tiles = {"BM": t.rows, "BK": t.reduction, "BR": chunk, "BF": t.cols}
            yield "conv2d", kind, {**tiles, **kernel, **place, "HAS_BIAS": True, "HAS_RESIDUAL": True}, t, wide


def _kernel(name):
    from alds_fast.kernels import triton_conv2d, triton_few_rows, triton_linear

    if name == "conv2d":
        return triton_conv2d._lowrank_conv2d_kernel
    return {
        "linear": triton_linear._lowrank_linear_kernel,
        "encode_rows": triton_few_rows._encode_rows_kernel,
        "decode_rows": triton_few_rows._decode_rows_kernel,
    }[name]


def compile_one(job):
    """Compile and read the resources of the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, dtype, constants, (warps, stages), arch, wide = job
    kernel = _kernel(name)
    free = ("M", "H", "W", "OH", "OW", "channels_per_part") if wide else kernel.arg_names
    widest = {"ACTIVATION": "gelu", "PRECISION": "tf32" if dtype == "tf32" else "ieee"}
    constants = {**constants, **{k: v for k, v in widest.items() if k in kernel.arg_names}}
    pointers = {"x", "encoder", "decoder", "bias", "residual", "y", "parts"}
    signature, attrs = {}, {}
    for i, arg in enumerate(kernel.arg_names):
        if arg in constants:
            signature[arg] = "constexpr"
            continue
        pointer = arg.rstrip("012") in pointers
        signature[arg] = ("*fp32" if arg == "parts" else f"*{dtype.replace('tf32', 'fp32')}") if pointer else "i32"
        if pointer or arg not in free or arg == "cols_per_program":
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, attrs)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    used = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout)}
    tiles = {k: v for k, v in constants.items() if k in ("BM", "BK", "BQ", "BR", "BF", "LAYERS", "PARTS")}
    flags = {k: v for k, v in constants.items() if k in ("ONE_SLICE", "DECODER_TAPS", "GROUPS")}
    return {
        "kernel": name, "dtype": dtype, **tiles, **flags, "warps": warps, "stages": stages, "sm": arch,
        "wide": wide, "registers": used["REG"], "spilled_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": compiled.metadata.shared, "shared_limit_bytes": SHARED_LIMIT[arch],
    }  # fmt: skip


def jobs():
    """Every configuration for both architectures; float16, which compiles like bfloat16, for sm_90 only."""
    for name, kind, constants, t, wide in configurations():
        for arch in (90,) if kind == "fp16" else (80, 90):
            yield name, kind, constants, (t.num_warps, t.num_stages), arch, wide


def main():
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        for row in pool.map(compile_one, jobs(), chunksize=4):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
