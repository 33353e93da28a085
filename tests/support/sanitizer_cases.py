"""Calls of the fused kernels that together launch every path, epilogue, tail and tiling; see sanitize.py."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from support.kernel_cases import (
    CONV,
    LINEAR,
    PIVOTED,
    WALK,
    as_int8,
    by_one,
    conv_case,
    linear_case,
    pivoted_case,
    random,
)

from alds_fast.kernels import dequantized, lowrank_conv2d, lowrank_linear, lowrank_linears
from alds_fast.kernels.fused import conv2d, few_rows
from benchmarks.gpu import aot

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ACTIVATIONS = (None, "relu", "silu", "gelu")
TILES = ("BM", "BK", "BQ", "BR", "BF", "BN", "M", "PARTS", "VECTORS", "LAYERS", "PIVOTS", "HAS_SCALE")


class Case(NamedTuple):
    """A call of (tensors, options, backend=) in one type; ``programs`` takes the place of conv2d.FEW_PROGRAMS."""

    group: str
    name: str
    type: str
    call: Callable
    made: Callable[[], tuple[dict[str, Any], dict[str, Any]]]
    programs: int = conv2d.FEW_PROGRAMS
    wanted: tuple | None = None  # what must be launched: kernel and constants


def linear(group, kind, m, c, groups, rank, f, activation=None, bias=True, residual=True, **more):
    def made():
        case = linear_case(m, c, groups, rank, f, TYPES[kind], bias, residual)
        return case, {"groups": groups, "activation": activation}

    flags = [activation, "bias" * bias, "residual" * residual]
    name = f"{m} rows, {c} channels, {groups} x rank {rank}, {f} filters" + "".join(f", {x}" for x in flags if x)
    return Case(group, name, kind, lowrank_linear, made, **more)


def pivoted(group, kind, m, c, rank, f, activation=None, bias=True, residual=True, **more):
    def made():
        case, order = pivoted_case(m, c, rank, f, TYPES[kind], bias, residual)
        return case, {"order": order, "activation": activation}

    flags = [activation, "bias" * bias, "residual" * residual]
    name = f"{m} rows, {c} channels, {rank} of {f} filters are pivots" + "".join(f", {x}" for x in flags if x)
    return Case(group, name, kind, lowrank_linear, made, **more)


def conv(group, kind, shape, options, activation=None, bias=True, residual=False, **more):
    def made():
        case = conv_case(*shape, TYPES[kind], bias)
        chosen = {"groups": shape[3], "activation": activation, **options}
        if residual:
            meta = {k: None if t is None else t.to("meta") for k, t in case.items()}
            like = lowrank_conv2d(**meta, **chosen, backend="two-op")
            case["residual"] = random(*like.shape, dtype=TYPES[kind], seed=6)
        return case, chosen

    n, c, size, groups, rank, f, kernels = shape
    kernel = kernels[kernels[1] != (1, 1)]
    flags = [activation, "bias" * bias, "residual" * residual, *(f"{k} {v}" for k, v in options.items())]
    name = f"{n} x {c} x {size}, {groups} x rank {rank}, {f} filters of {kernel}" + "".join(
        f", {x}" for x in flags if x
    )
    return Case(group, name, kind, lowrank_conv2d, made, **more)


def _merged_call(x, encoder, present, backend, scales=None, **tensors):
    decoders, biases = ([tensors[f"{k}{i}"] for i in range(len(present))] for k in ("decoder", "bias"))
    return lowrank_linears(x, encoder, decoders, [b if p else None for b, p in zip(biases, present, strict=True)],
                           scales=scales, backend=backend)  # fmt: skip


def merged(group, kind, m, c, ranks, filters, present, **more):
    def made():
        x, encoder = (random(n, c, dtype=TYPES[kind], scale=s) for n, s in ((m, 1), (sum(ranks), c**-0.5)))
        case = {"x": x, "encoder": encoder}
        for i, (r, f) in enumerate(zip(ranks, filters, strict=True)):
            case[f"decoder{i}"] = random(f, r, dtype=TYPES[kind], seed=i, scale=r**-0.5)
            case[f"bias{i}"] = random(f, dtype=TYPES[kind], seed=i)
        return case, {"present": present}

    name = f"{m} rows, {c} channels, ranks {ranks}, {filters} filters, biases {present}"
    return Case(group, name, kind, _merged_call, made, **more)


def _int8_call(call):
    """The call of tensors with int8 factors, whose scales stand among them; float64 has what these stand for."""

    def int8(backend, **tensors):
        scales = {name: tensors.pop(f"scale of {name}") for name in list(tensors) if f"scale of {name}" in tensors}
        if tensors["x"].dtype == torch.float64:
            tensors |= {name: dequantized(tensors[name], scale) for name, scale in scales.items()}
            return call(**tensors, backend=backend)
        return call(**tensors, scales=list(scales.values()), backend=backend)

    return int8


def as_int8_case(case):
    """The same with int8 factors."""

    def made():
        tensors, options = case.made()
        tensors, scales, _ = as_int8(tensors)
        factors = [name for name in tensors if name.startswith(("encoder", "decoder"))]
        return tensors | {f"scale of {name}": s for name, s in zip(factors, scales, strict=True)}, options

    return case._replace(name=f"{case.name}, int8", call=_int8_call(case.call), made=made)


def int8():
    """Up to 16 rows with int8 factors, by vectors and by matrix units, of one slice, several and pivots."""
    few = [shape for shape in LINEAR if shape[0] <= 16], [shape for shape in PIVOTED if shape[0] <= 16]
    for kind in TYPES:
        yield from (as_int8_case(linear("int8", kind, *shape)) for shape in few[0])
        yield from (as_int8_case(pivoted("int8", kind, *shape)) for shape in few[1])
    for i, kind in zip(range(1, 25), itertools.cycle(TYPES), strict=False):
        m, rank, f = 1 + i % 16, 49 - i, 11 * i % 64 + 1
        yield as_int8_case(linear("int8", kind, m, 5 * i + 97, 1, rank, f, ACTIVATIONS[i % 4]))
        yield as_int8_case(pivoted("int8", kind, m, i, rank, rank + f, ACTIVATIONS[i % 4]))
    yield from map(as_int8_case, (case._replace(group="int8") for case in merges()))


def shapes():
    """The shapes that Triton's interpreter runs too."""
    for kind in TYPES:
        yield from (linear("shapes", kind, *shape) for shape in LINEAR)
        yield from (pivoted("shapes", kind, *shape) for shape in PIVOTED)
        yield from (conv("shapes", kind, *case) for case in CONV)


def tails():
    """Rows or pixels, channels, ranks and filters at every distance from a multiple of 16."""
    for i, kind in zip(range(96), itertools.cycle(TYPES), strict=False):
        m, c, rank, f = i % 64 + 1, 7 * i % 64 + 1, 5 * i % 40 + 1, 11 * i % 64 + 1
        groups = (1, 1, 2, 3)[i // 3 % 4]
        yield linear("tails", kind, m, c * groups, groups, rank, f)
        if i % 2:
            yield pivoted("tails", kind, m, c, rank, rank + f)
            size, stride = (1 + i % 7, 2 + 3 * i % 11), {"stride": 1 + i // 2 % 2, "padding": 1}
            yield conv("tails", kind, (2, c, size, 1, rank, f, by_one(3, 3)), stride)
        elif kind != "fp32":  # by rows of taps, which takes multiples of 16: tails of pixels, and of filters in a tile
            d = 1 + i // 2 % 4
            shape = (3, 16, (1 + i % 5, 1 + i % 19), 1, (16, 32)[i // 4 % 2], (48, 272)[i // 8 % 2], by_one(3, 3))
            yield conv("tails", kind, shape, {"dilation": d, "padding": d})


def few_rows_tails():
    """The same for up to 16 rows, with channels up to more than one tile has."""
    for i, kind in zip(range(1, 49), itertools.cycle(TYPES), strict=False):
        m, rank, f = 1 + i // 3 % 2, 49 - i, 11 * i % 64 + 1
        yield linear("tails", kind, m, i, 1, rank, f)
        yield pivoted("tails", kind, m, 5 * i + 97, rank, rank + f)
        yield linear("tails", kind, 3 + i % 14, 5 * i + 97, 1, rank + i % 4 * 32, f)


def epilogues():
    """Every epilogue of every path in bf16; in the other types with a bias and a residual."""
    every = list(itertools.product(ACTIVATIONS, (True, False), (True, False)))
    full = [e for e in every if e[1] and e[2]]
    for kind in TYPES:
        for a, b, r in every if kind == "bf16" else full:
            for m in (1, 2, 5, 20):
                yield linear("epilogues", kind, m, 33, 1, 5, 24, a, b, r)
                yield pivoted("epilogues", kind, m, 33, 5, 24, a, b, r)
            yield linear("epilogues", kind, 20, 32, 2, 5, 24, a, b, r)
            for kernel in (by_one(3, 3), by_one(2, 2)):  # by rows of taps but for fp32, and by taps
                yield conv("epilogues", kind, (1, 16, (4, 5), 1, 16, 16, kernel), {"padding": 1}, a, b, r)


def merges():
    for kind, m, count in itertools.product(TYPES, (1, 2, 5), (1, 2, 3)):
        present = [(i + m) % 2 == 0 for i in range(count)]
        yield merged("merged", kind, m, 48, [20, 3, 33][:count], [40, 17, 64][:count], present)


def far():
    """Images of a tile more than 2^31 elements apart, by the bound that the launcher has."""
    options = {"stride": 1440}
    yield conv("far", "bf16", (2, 16, (1440, 1440), 1, 16, 16, by_one(1, 1)), options, wanted=("taps", {"FAR": True}))


def walk(kind, shape, **more):
    """Scheme 3; fp16 as on compute capability 8.0, see sanitize.py."""
    n, c, size, rank, f = shape
    return conv("walk", kind, (n, c, size, 1, rank, f, ((1, 1), (3, 3))), {"padding": 1}, **more)


def walks():
    """Down images: epilogues, tails of images, rows, columns and filters, on either device."""
    every = list(itertools.product(ACTIVATIONS, (True, False), (True, False)))
    for kind, cols in (("bf16", 64), ("fp16", 32)):
        yield from (walk(kind, shape) for shape in WALK)
        yield from (walk(kind, (3, 16, (5, 4), 16, 32), activation=a, bias=b, residual=r) for a, b, r in every)
        for i in range(24):
            c, f, rank = 16 + 16 * (i % 4), 16 + 16 * (i // 4 % 4), 16 + 16 * (i % 2)
            yield walk(kind, (1 + 3 * i % 5, c, (1 + 5 * i % 19, 1 + 11 * i % 40), rank, f), residual=i % 3 == 0)
        for rank, width in itertools.product((16, 32), (63, 64)):
            wanted = "conv2d_walk", {"BF": cols, "BQ": rank, "FULL": width == 64}
            yield walk(kind, (1, 64, (9, width), rank, 64), activation="gelu", residual=True, wanted=wanted)


def _epilogue(t):
    heavy = t.get("HAS_RESIDUAL", True)
    return {"activation": "gelu" if heavy else "relu", "residual": heavy}


def _linear_tiling(kind, t, odd):
    wanted = "linear", {k: t[k] for k in (*TILES, "GROUPS", "WHOLE", "FAR") if k in t}
    m, groups, channels = t["BM"] + (t["BM"] if t["WHOLE"] else 6), t["GROUPS"], 128 if t["WHOLE"] else 80 + (odd and 6)
    rank, f = t["Q"] // groups, 128 if t["WHOLE"] else 80
    if t["PIVOTS"]:
        return pivoted("tilings", kind, m, channels, rank, rank + f, **_epilogue(t), wanted=wanted)
    if rank % 16 and not odd:
        return None  # ranks of two slices are no multiples of 16 here
    return linear("tilings", kind, m, channels * groups, groups, rank, f, **_epilogue(t), wanted=wanted)


def _parts(kind, channels, wanted):
    return linear("tilings", kind, 5, channels, 1, 20, 16, wanted=wanted)


def _few_rows_tiling(name, kind, t, odd):
    case = _floating_tiling(name, kind, t, odd)
    return as_int8_case(case) if t.get("HAS_SCALE") else case


def _floating_tiling(name, kind, t, odd):
    wanted = name, {k: t[k] for k in TILES if k in t and (k != "BM" or name == "encode_rows")}
    if name == "encode_rows":
        return _parts(kind, t["PARTS"] * t["BK"] * (3 if odd else 2) - odd, wanted)
    if name == "encode_vectors":
        return linear("tilings", kind, t["M"], t["C_GROUP"], 1, 20, 16, wanted=wanted)
    m, rank, f = t["VECTORS"] or 5, t["RANK0"], 48 - odd
    if t["LAYERS"] > 1:
        return merged("tilings", kind, m, 16, [rank] * 3, [f] * 3, [True] * 3, wanted=wanted)
    if t["PIVOTS"]:
        return pivoted("tilings", kind, m, 16, rank, rank + f, "gelu", wanted=wanted)
    return linear("tilings", kind, m, 16, 1, rank, f, "gelu", wanted=wanted)


def _conv_tiling(name, kind, t, odd):
    """By rows of taps, or with a stride, which those do not take; tiles for many pixels by asking for few programs."""
    wanted = name, {k: t[k] for k in (*TILES, "GROUPS", "CHUNKS", "FAR", "KW") if k in t}
    options = {"padding": (1, t["KW"] // 2)} | ({} if name == "conv2d_rows" else {"stride": (2, 1)})
    if t["SIZE"]:
        return None  # as a constant where it is a layer's first: the other calls
    if t["CHUNKS"] > 1 and t["BR"] < (64 if odd or kind == "fp32" else conv2d.MAX_CHUNK):
        return None  # compiled, but a larger chunk is chosen
    large = t["BM"] == (64 if name == "conv2d_rows" else 128)
    shape = (1, t["C"], (9, 11), t["GROUPS"], t["RANK"], t["F"], by_one(3, t["KW"]))
    programs = 0 if large else conv2d.FEW_PROGRAMS
    return conv("tilings", kind, shape, options, **_epilogue(t), programs=programs, wanted=wanted)


def _tiling(name, kind, t, odd):
    """A call that launches this configuration; those of walks are among theirs."""
    if name == "conv2d_walk":
        return None
    if name == "linear":
        return _linear_tiling(kind, t, odd)
    return _conv_tiling(name, kind, t, odd) if "conv" in name else _few_rows_tiling(name, kind, t, odd)


def tilings():
    """Everything that the launchers can choose, as far as the IR of it differs; half types take turns."""
    seen, halves = set(), itertools.cycle(("bf16", "fp16"))
    for name, kind, t, _, wide in aot.configurations():
        key = name, kind, wide, *(v for k, v in t.items() if k not in ("HAS_RESIDUAL", "ACTIVATION"))
        if kind not in ("bf16", "fp32") or key in seen:
            continue
        seen.add(key)
        case = _tiling(name, next(halves) if kind == "bf16" else kind, t, 0 if wide else 3)
        if case is not None:
            yield case
    for kind, (parts, tiles) in itertools.product(TYPES, ((3, 9), (6, 17), (7, 19))):  # channels rounded up to tiles
        channels = tiles * few_rows.encode_tiling(TYPES[kind]).reduction
        yield _parts(kind, channels, ("encode_rows", {"PARTS": parts}))


def all_cases():
    return [*shapes(), *tails(), *few_rows_tails(), *epilogues(), *merges(), *int8(), *far(), *walks(), *tilings()]
