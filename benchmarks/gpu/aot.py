"""Compile every configuration that the launchers can choose for sm_80 and sm_90, without a GPU; run as a script.

Prints one JSON row per compilation: kernel, dtype, tiles, architecture, registers, spilled bytes, shared bytes, how
many programs run on a multiprocessor at once, and what the hot loops have (:func:`benchmarks.gpu.sass.counts`). The
widest epilogue is compiled (bias, residual, GELU). "wide" configurations are for channels, ranks and filters that are
multiples of 16, the others for any.

A row's key says what its machine code follows from. ``--known FILE`` takes from a table the rows whose key is there,
but for one in sixteen, which are compiled again.
"""

import argparse
import concurrent.futures
import hashlib
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.common.results import ROOT

from . import sass

SHOWN = ("BM", "BK", "BQ", "BR", "BF", "BN", "C_GROUP", "M", "RANK0", "LAYERS", "PARTS", "VECTORS", "PIVOTS",
         "HAS_SCALE", "WHOLE")  # fmt: skip
OF_TILES = ("cols_per_program", "channels_per_part")  # multiples of a tile whatever the sizes are
AGAIN = 16  # of so many known rows one is compiled again
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


def configurations():
    """(kernel name, dtype, constants, tiling, whether sizes are multiples of 16) of everything that is reachable."""
    from alds_fast.kernels import limits
    from alds_fast.kernels.fused import linear

    sizes = [16, 32, 64, 128, 256]
    for kind, wide in itertools.product(TYPES, (True, False)):
        dtype = TYPES[kind]
        for hidden, heavy in itertools.product([s for s in sizes if s <= limits.MAX_HIDDEN], (True, False)):
            forms = ((True, False), (False, False), (True, True)) if heavy else ((True, False),)  # several slices are
            for one, pivots in forms:
                t = linear.tile_tiling(hidden, dtype, wide, heavy, pivots)
                if not heavy and t == linear.tile_tiling(hidden, dtype, wide, True):
                    continue
                tiles = {"BM": t.rows, "BK": t.reduction, "BQ": hidden, "BF": t.cols, **epilogue(heavy)}
                tiles |= {"GROUPS": 1 if one else 2, "PIVOTS": pivots, "FAR": False}
                odd = 0 if wide else 6
                for whole, less in ((True, 0), (False, 0), (False, 16)) if wide else ((False, odd),):
                    layer = {"C": 1024 + odd, "Q": hidden - less, "ROWS": 1024 - odd, "WHOLE": whole}
                    if less < hidden // 2 and (less == 0 or (heavy and one)):
                        yield "linear", kind, {**tiles, **layer}, t, wide
        for scaled in (False, True):
            yield from _few_rows(kind, dtype, wide, scaled)
        yield from _convolutions(kind, dtype, wide)
    yield from _walks()


def epilogue(heavy):
    """Bias, residual and GELU, or bias and ReLU only."""
    return {"HAS_BIAS": True, "HAS_RESIDUAL": heavy, "ACTIVATION": "gelu" if heavy else "relu"}


def _few_rows(kind, dtype, wide, scaled):
    """Encoders and decoders of few rows, all PARTS, with and without the early launch (sm_90), and of int8 factors."""
    from alds_fast.kernels.fused import few_rows, vectors

    odd, int8 = 0 if wide else 3, {"HAS_SCALE": True} if scaled else {}
    for parts in (1, 2, 4, 8):
        t = few_rows.encode_tiling(dtype, scaled)
        yield "encode_rows", kind, {"PARTS": parts, "BM": t.rows, "BK": t.reduction, "BQ": t.cols, **int8}, t, wide
    for reduction, m in itertools.product((128, 4096, 16384), (1, 2)):
        t = vectors.vector_tiling(reduction - odd, m)
        of = {"C_GROUP": reduction - odd, "M": m}
        yield "encode_vectors", kind, {**of, "BN": t.cols, "BK": t.reduction, **int8}, t, wide
    flags = {f"HAS_BIAS{i}": True for i in range(3)}
    for (layers, pivots), m, rank in itertools.product(((1, False), (1, True), (3, False)), (0, 1, 2), (64, 3072)):
        t = vectors.vector_tiling(rank - odd, m, 4) if m else few_rows.decode_tiling(dtype, wide, scaled)
        ranks = {f"RANK{i}": rank - odd for i in range(3)}
        tiles = {"LAYERS": layers, "VECTORS": m, "BM": t.rows, "BK": t.reduction, "BF": t.cols, "PIVOTS": pivots}
        yield "decode_rows", kind, {**tiles, **ranks, **flags, **int8, "HAS_RESIDUAL": layers == 1}, t, wide


def _convolutions(kind, dtype, wide):
    """By taps and by rows of taps; one slice and two, one chunk and several, all tiles; images of any size and one."""
    from alds_fast.kernels.fused import conv2d

    small, large = ((16,), (16, 64), (16, 128)), ((64,), (16, 32, 64, 128), (64, 128, 256))
    more, seen = ((1000, 10**6), (True, False)), set()
    layers = itertools.product(*small, *more), itertools.product(*large, *more)
    for channels, chunk, filters, pixels, heavy in itertools.chain(*layers):
        if chunk == 128 and (not wide or dtype == torch.float32):
            continue
        taps = conv2d.taps_tiling(pixels, channels, chunk, filters, dtype, wide, heavy)
        runs = [("conv2d_taps", taps, {"SH": 1, "SW": 1, "PW": 1, "KW": 3})]
        if wide and dtype != torch.float32 and chunk <= conv2d.MAX_ROWS_RANK:
            for width in (3, 5) if chunk <= conv2d.MAX_ROWS_RANK // 2 else (3,):
                t = conv2d.rows_tiling(pixels, channels, filters, heavy, width)
                runs.append(("conv2d_rows", t, {"KW": width}))
        odd = 0 if wide else 1
        for (name, t, place), (groups, chunks) in itertools.product(runs, ((1, 1), (2, 2))):
            key = name, t, chunk, channels, groups, place["KW"]
            several = chunks > 1 and (not heavy or (channels, filters) != (64, 256) or name == "conv2d_rows")
            if key in seen or several:  # the heavy epilogue comes first, and says more
                continue
            seen.add(key)
            layer = {"C": groups * (channels + odd), "RANK": chunks * chunk - odd, "F": filters - odd}
            layer |= {"GROUPS": groups, "CHUNKS": chunks, "KH": 3, "PH": 1, "DH": 1, "DW": 1, "FAR": False}
            tiles = {"BM": t.rows, "BK": t.reduction, "BR": chunk, "BF": t.cols}
            side = (28, 28) if name == "conv2d_rows" else (28, 28, 28, 28)
            for size in ((), side) if kind == "bf16" else ((),):
                yield name, kind, {**tiles, **layer, **place, **epilogue(heavy), "SIZE": size}, t, wide


def _walks():
    """Down images, with the columns of either architecture: of one size, of any, and of several narrow ones."""
    from alds_fast.kernels.fused import conv2d_walk

    kinds = (16, 64, True), (32, 64, True), (16, 32, True), (32, 32, True), (16, 64, False)
    for kind, (rank, cols, heavy) in itertools.product(("bf16", "fp16"), kinds):
        t = conv2d_walk.walk_tiling(64, cols, 4)
        tiles = {"PARTS": t.parts, "BM": t.rows, "BK": t.reduction, "BQ": rank, "BF": t.cols, "FAR": False}
        for size, width, channels in (((56, 56), 64, 64), ((), 64, 64), ((7, 7), 8, 48)):
            layer = {"C": channels, "F": channels, "BW": width, "SIZE": size, "FULL": not size}
            yield "conv2d_walk", kind, {**tiles, **layer, **epilogue(heavy)}, t, True


def _kernel(name):
    from alds_fast.kernels.fused import conv2d, conv2d_walk, few_rows, linear, vectors

    return {
        "conv2d_taps": conv2d._conv2d_taps_kernel,
        "conv2d_rows": conv2d.conv2d_rows_kernel,
        "conv2d_walk": conv2d_walk.conv2d_walk_kernel,
        "linear": linear._lowrank_linear_kernel,
        "encode_rows": few_rows._encode_rows_kernel,
        "encode_vectors": vectors.encode_vectors_kernel,
        "decode_rows": few_rows._decode_rows_kernel,
    }[name]


def compiled(source, sm, options):
    """(the resources of the machine code, the cubin) of a Triton source."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    used = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout)}
    shared = kernel.metadata.shared
    return {
        "registers": used["REG"], "spilled_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": shared, "shared_limit_bytes": sass.SHARED_LIMIT[sm],
        "programs": sass.programs_of_a_multiprocessor(used["REG"], options["num_warps"], shared, sm),
    }, kernel.asm["cubin"]  # fmt: skip


def compile_one(job):
    """(the row of a configuration, its cubin)."""
    from triton.compiler import ASTSource

    name, dtype, constants, (warps, stages), arch, wide = job
    kernel = _kernel(name)
    free = ("M", "H", "W", "OH", "OW") if wide else kernel.arg_names
    widest = {"ACTIVATION": "gelu", "PRECISION": "tf32" if dtype == "tf32" else "ieee"}
    widest |= {"EARLY": arch >= 90, "WAIT": arch >= 90, "HAS_SCALE": False}
    constants = {**{k: v for k, v in widest.items() if k in kernel.arg_names}, **constants}
    floating = ("x", "encoder", "decoder", "scale", "bias", "residual", "y", "hidden")
    types = dict.fromkeys(floating, dtype.replace("tf32", "fp32"))
    types |= {"parts": "fp32", "tickets": "i32", "outputs": "i32"}
    types |= {"encoder": "i8", "decoder": "i8"} if constants.get("HAS_SCALE") else {}
    signature, attrs = {}, {}
    for i, arg in enumerate(kernel.arg_names):
        if arg in constants:
            signature[arg] = "constexpr"
            continue
        pointer = arg.rstrip("012") in types
        signature[arg] = f"*{types[arg.rstrip('012')]}" if pointer else "i32"
        if pointer or arg not in free or arg in OF_TILES:
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, attrs)
    resources, cubin = compiled(source, arch, {"num_warps": warps, "num_stages": stages})
    tiles = {k: v for k, v in constants.items() if k in SHOWN}
    flags = {k: v for k, v in constants.items() if k in ("GROUPS", "CHUNKS", "KW", "SIZE")}
    row = {"kernel": name, "dtype": dtype, **tiles, **flags, "warps": warps, "stages": stages, "sm": arch, "wide": wide}
    return {**row, **resources}, cubin


def counted(results):
    """The rows of (row, cubin) with what the hot loops have."""
    by_sm: dict[int, list] = {}
    for row, cubin in results:
        by_sm.setdefault(row["sm"], []).append((row, cubin))
    for sm, some in by_sm.items():
        for (row, _), code in zip(some, sass.disassembled([cubin for _, cubin in some], sm), strict=True):
            row |= sass.counts(code)
    return [row for row, _ in results]


def jobs():
    """Every configuration for both architectures; float16, which compiles like bfloat16, for sm_90 only."""
    for name, kind, constants, t, wide in configurations():
        archs = (90,) if kind == "fp16" else (80, 90)
        if name == "conv2d_walk":  # sm_90 takes all columns whatever the epilogue is
            archs = (90,) if t.cols == 64 and constants["HAS_RESIDUAL"] else (80,)
        for arch in archs:
            yield name, kind, constants, (t.num_warps, t.num_stages), arch, wide


def key_of(job):
    """What the row of a configuration follows from: it, the kernel's source, Triton, how it is compiled and counted."""
    import triton

    ways = inspect.getsource(compile_one), inspect.getsource(compiled), inspect.getsource(sass)
    of = job, _kernel(job[0]).cache_key, triton.__version__, ways
    return hashlib.sha256(repr(of).encode()).hexdigest()[:16]


def _rows(some):
    return [{**row, "key": key_of(job)} for row, job in zip(counted(list(map(compile_one, some))), some, strict=True)]


def compiled_rows(module="benchmarks.gpu.aot", *arguments):
    """The rows that a module of this folder prints, from a process in which Triton compiles instead of interpreting."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables, timeout=3600)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return [json.loads(line) for line in filter(None, done.stdout.splitlines())]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--known", type=Path, metavar="FILE", help="the table of another run")
    file = parser.parse_args().known
    known = {row["key"]: row for row in json.loads(file.read_text())["rows"]} if file else {}
    taken = {key for key in known if int(key, 16) % AGAIN}
    everything = [(job, key_of(job)) for job in jobs()]
    print("\n".join(json.dumps(known[key]) for _, key in everything if key in taken))
    left = [job for job, key in everything if key not in taken]
    batches = [left[i : i + 16] for i in range(0, len(left), 16)]
    with concurrent.futures.ProcessPoolExecutor(int(os.environ.get("AOT_PROCESSES", 2))) as pool:
        for rows in pool.map(_rows, batches):
            print("\n".join(map(json.dumps, rows)), flush=True)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
