"""The operations that the GPU suite times: shapes, random tensors, and the ways to compute each.

A case is one operation at one size. ``sides`` are what takes turns: "dense", "two_op" (library calls), "fused", and
for some "padded" (the grouped encoder as a dense one with zeros), "separate" (three fused layers instead of merged
ones) and "merged_two_op" (one encoder call for three layers).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alds_fast.kernels import lowrank_conv2d, lowrank_linear, lowrank_linears

CONVS, LINEARS = ("conv3x3", "conv1x1"), ("linear",)
Tensors = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """``q`` = groups * rank (of each layer for "qkv"); ``rows`` for linears, ``batch`` and ``size`` for convolutions.

    ``aim`` is what the design expects of an H100: dense / deployed and two-op / deployed. Cases of ``priority`` 0 run
    first; ``compiled`` ones are also timed under torch.compile, if time is left.
    """

    op: str
    channels: int
    filters: int
    q: int
    rows: int = 0
    batch: int = 0
    size: int = 0
    groups: int = 1
    scheme: int = 0
    bias: bool = False
    dtype: str = "bfloat16"
    priority: int = 1
    aim: tuple[float, float] | None = None
    compiled: bool = False

    @property
    def kernel(self) -> int:
        return 3 if self.op == "conv3x3" else 1

    @property
    def layers(self) -> int:
        return 3 if self.op == "qkv" else 1

    @property
    def is_conv(self) -> bool:
        return self.op in CONVS

    @property
    def key(self) -> str:
        size = f"b{self.batch} {self.size}x{self.size}" if self.is_conv else f"m{self.rows}"
        extra = (f" g{self.groups}" if self.groups > 1 else "") + (f" scheme{self.scheme}" if self.scheme else "")
        name = f"{self.op} {self.channels}->{self.filters} {size} q{self.q}{extra}"
        return name if self.dtype == "bfloat16" else f"{name} {self.dtype}"

    @property
    def shape(self) -> dict[str, int]:
        names = ("batch", "size", "kernel", "scheme") if self.is_conv else ("rows", "layers")
        return {n: getattr(self, n) for n in ("channels", "filters", "q", "groups", *names)}

    @property
    def positions(self) -> int:
        return self.batch * self.size**2 if self.is_conv else self.rows

    def flops(self) -> tuple[int, int]:
        """Of the dense and of the factorised operation."""
        taps, c, f = self.kernel**2, self.channels, self.filters
        encoder, decoder = (1, taps) if self.scheme == 3 else (taps, 1)
        factors = self.q * (c // self.groups * encoder + f * decoder)
        return 2 * self.positions * self.layers * taps * c * f, 2 * self.positions * self.layers * factors

    def reduction(self) -> float:
        """How many times fewer operations the factorised one has."""
        dense, factored = self.flops()
        return dense / factored

    def describe(self) -> dict[str, Any]:
        """The fields of a row that are known beforehand, the others empty."""
        measured = ("dense_ms", "two_op_ms", "fused_ms", "deployed_ms", "compiled_ms", "roofline_ms", "max_error")
        about = {"name": self.key, "op": self.op, "shape": self.shape, "dtype": self.dtype, "aim": self.aim}
        about |= {"flop_reduction": self.reduction(), "deployed": None, "interpreted": False, "copies": None}
        return (
            about
            | dict.fromkeys(measured)
            | {"quantiles": {}, "errors": {}, "reasons": {}, "errors_ok": None, "error": None}
        )


def make(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Random tensors of a case; the dense weight is the product of the factors, rounded."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        t = (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    c_group, q, f = case.channels // case.groups, case.q, case.filters
    if not case.is_conv:
        x = draw(case.rows, case.channels)
        encoder = draw(case.layers * q, c_group, scale=c_group**-0.5)
        decoders = [draw(f, q, scale=q**-0.5) for _ in range(case.layers)]
    else:
        taps = ((1, 1), (case.kernel,) * 2) if case.scheme == 3 else ((case.kernel,) * 2, (1, 1))
        x = draw(case.batch, case.channels, case.size, case.size)
        encoder = draw(q, c_group, *taps[0], scale=(c_group * math.prod(taps[0])) ** -0.5)
        decoders = [draw(f, q, *taps[1], scale=(q * math.prod(taps[1])) ** -0.5)]
    biases = [draw(f) if case.bias else None for _ in decoders]
    weights = [compose(e, d, case) for e, d in zip(encoder.chunk(case.layers), decoders, strict=True)]
    return {"x": x, "encoder": encoder, "decoders": decoders, "biases": biases, "weights": weights}


def compose(encoder: Tensor, decoder: Tensor, case: Case) -> Tensor:
    """The dense weight of one layer, in the type of its factors."""
    parts = []
    for e, d in zip(encoder.float().chunk(case.groups), decoder.float().chunk(case.groups, 1), strict=True):
        pattern = "fqyx,qc->fcyx" if case.scheme == 3 else "fq,qcyx->fcyx" if case.is_conv else "fq,qc->fc"
        last = e[..., 0, 0] if case.scheme == 3 else e
        parts.append(torch.einsum(pattern, d[..., 0, 0] if case.is_conv and case.scheme == 0 else d, last))
    weight = torch.cat(parts, 1).to(encoder.dtype)
    return weight.contiguous(memory_format=torch.channels_last) if case.is_conv else weight


def padded_encoder(encoder: Tensor, groups: int) -> Tensor:
    """The block-diagonal encoder as a full one."""
    blocks = encoder.chunk(groups)
    full = encoder.new_zeros(encoder.shape[0], encoder.shape[1] * groups, *encoder.shape[2:])
    for i, block in enumerate(blocks):
        rank, c = block.shape[:2]
        full[i * rank : (i + 1) * rank, i * c : (i + 1) * c] = block
    return full.contiguous(memory_format=torch.channels_last) if full.dim() == 4 else full


def copy_of(tensors: Tensors) -> Tensors:
    """The same values in memory of their own."""

    def clone(value: Any) -> Any:
        return [clone(v) for v in value] if isinstance(value, list) else None if value is None else value.clone()

    return {name: clone(value) for name, value in tensors.items()}


def size_bytes(tensors: Tensors, *names: str) -> int:
    """Of the named tensors."""
    every = [t for n in names for t in (tensors[n] if isinstance(tensors[n], list) else [tensors[n]]) if t is not None]
    return sum(t.numel() * t.element_size() for t in every)


def roofline_bytes(case: Case, tensors: Tensors) -> int:
    """Input, factors and biases read once, output written once."""
    out = case.positions * case.filters * case.layers * tensors["x"].element_size()
    return size_bytes(tensors, "x", "encoder", "decoders", "biases") + out


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """With the padding that keeps the size."""
    return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)


def lowrank(case: Case, t: Tensors, backend: str) -> Tensor:
    """One factorised layer by the library's own function."""
    args, groups = (t["x"], t["encoder"], t["decoders"][0], t["biases"][0]), case.groups
    if case.is_conv:
        return lowrank_conv2d(*args, groups=groups, padding=case.kernel // 2, backend=backend)
    return lowrank_linear(*args, groups=groups, backend=backend)


def three(t: Tensors, backend: str) -> list[Tensor]:
    """Three layers that read the same input, one after the other."""
    layers = zip(t["encoder"].chunk(3), t["decoders"], t["biases"], strict=True)
    return [lowrank_linear(t["x"], e, d, b, backend=backend) for e, d, b in layers]


def merged(t: Tensors, backend: str) -> list[Tensor]:
    """The three layers with one encoder call."""
    return lowrank_linears(t["x"], t["encoder"], t["decoders"], t["biases"], backend=backend)


def sides(case: Case) -> dict[str, Callable[[Tensors], Any]]:
    """The calls that take turns, by name; each takes the tensors."""
    if case.op == "qkv":
        return {
            "dense": lambda t: [F.linear(t["x"], w, b) for w, b in zip(t["weights"], t["biases"], strict=True)],
            "two_op": lambda t: three(t, "two-op"),
            "fused": lambda t: merged(t, "fused"),
            "separate": lambda t: three(t, "fused"),
            "merged_two_op": lambda t: merged(t, "two-op"),
        }
    dense = convolve if case.is_conv else F.linear
    found: dict[str, Callable[[Tensors], Any]] = {
        "dense": lambda t: dense(t["x"], t["weights"][0], t["biases"][0]),
        "two_op": lambda t: lowrank(case, t, "two-op"),
        "fused": lambda t: lowrank(case, t, "fused"),
    }
    if case.groups > 1 and case.is_conv:
        found["padded"] = lambda t: F.conv2d(convolve(t["x"], t["full"], None), t["decoders"][0], t["biases"][0])
    return found


def two_op(case: Case) -> Callable[[Tensors], Any]:
    """The call that torch.compile gets."""
    return sides(case)["two_op"]


def reference(case: Case, tensors: Tensors) -> list[Tensor]:
    """The result in float64 from the same rounded factors."""
    exact = {n: [None if t is None else t.double() for t in v] if isinstance(v, list) else v.double()
             for n, v in tensors.items() if n != "weights"}  # fmt: skip
    if case.op == "qkv":
        return three(exact, "two-op")
    return [lowrank(case, exact, "two-op")]


def _conv3x3() -> list[Case]:
    found = []
    table = [  # size, channels, q of about 2x and of a lower rank, {q: {batch: what the design expects}}
        (56, 64, (32, 16), {32: {32: (1.35, 1.4), 128: (1.4, 1.5)}, 16: {32: (1.6, 1.4), 128: (1.7, 1.5)}}),
        (28, 128, (64, 32), {64: {32: (1.5, 1.3), 128: (1.5, 1.3)}, 32: {32: (2.0, 1.35), 128: (2.0, 1.35)}}),
        (14, 256, (128, 64), {64: {128: (2.0, 1.3)}}),
        (7, 512, (256, 128), {128: {32: (1.6, 1.0), 128: (2.0, 1.0)}}),
    ]
    for size, c, ranks, aims in table:
        for batch in (32, 128, 1):
            for q in ranks:
                options = {"priority": 0 if batch > 1 else 1, "aim": aims.get(q, {}).get(batch)}
                options["compiled"] = batch == 32 and q == ranks[0]
                found.append(Case("conv3x3", c, c, q, batch=batch, size=size, **options))
    sliced = [(64, 56, 32, 2), (64, 56, 64, 4), (128, 28, 128, 4), (128, 28, 192, 4), (256, 14, 256, 4)]
    for c, size, q, groups in sliced:
        found += [Case("conv3x3", c, c, q, batch=b, size=size, groups=groups) for b in (32, 128)]
    return found + [Case("conv3x3", 64, 64, 16, batch=b, size=56, scheme=3, priority=2) for b in (32, 128)]


def _conv1x1() -> list[Case]:
    table = [(64, 256, 56, (32, 16)), (256, 64, 56, (32, 16)), (512, 128, 28, (48, 32)), (1024, 256, 14, (96, 64))]
    return [
        Case("conv1x1", c, f, q, batch=b, size=size, priority=i + (b == 1), compiled=b == 32 and i == 0 and c == 64)
        for c, f, size, ranks in table for b in (32, 128, 1) for i, q in enumerate(ranks)
    ]  # fmt: skip


def _linears() -> list[Case]:
    tokens = 197 * 128
    table = [  # channels, filters, q of 2x and of a lower rank, rows, bias
        (768, 3072, (304, 128), (1, 16, tokens, 4, 2048), True),
        (3072, 768, (304, 128), (1, 16, tokens, 4, 2048), True),
        (768, 768, (192, 96), (1, 16, tokens, 4, 2048), True),
        (4096, 4096, (1024, 512), (1, 16, 2048, 4), False),
        (4096, 11008, (1488, 736), (1, 16, 2048, 4), False),
        (11008, 4096, (1488, 736), (1, 16, 2048, 4), False),
    ]
    decode = (1.5, 1.12)
    aims = {(768, 3072, 128, tokens): (2.4, 1.05), (4096, 4096, 1024, 2048): (1.6, 0.98)}
    aims |= {(4096, 4096, 1024, m): decode for m in (1, 4, 16)}
    chosen = [(768, 3072, 304, tokens), (4096, 4096, 1024, 1)]
    found = []
    for c, f, ranks, rows, bias in table:
        for q, m in ((q, m) for q in ranks for m in rows):
            place = (c, f, q, m)
            urgent = 0 if place in aims or (q == ranks[0] and m != 4) else 1
            options = {"bias": bias, "priority": urgent, "aim": aims.get(place), "compiled": place in chosen}
            found.append(Case("linear", c, f, q, rows=m, **options))
    return found


def _qkv() -> list[Case]:
    aims = {4096: (1.7, 1.4)}
    return [
        Case("qkv", c, c, q, rows=m, bias=c == 768, priority=0, aim=aims.get(c), compiled=m == 1 and c == 4096)
        for c, q in ((4096, 1024), (768, 192)) for m in (1, 4, 16)
    ]  # fmt: skip


def all_cases() -> list[Case]:
    """Every case, the most telling ones first."""
    return sorted([*_conv3x3(), *_qkv(), *_linears(), *_conv1x1()], key=lambda case: case.priority)


def quick_cases(cuda: bool) -> list[Case]:
    """Tiny ones of every kind."""
    dtype = "bfloat16" if cuda else "float32"
    return [
        Case("conv3x3", 16, 16, 8, batch=1, size=6, dtype=dtype, compiled=True),
        Case("conv3x3", 16, 16, 16, batch=1, size=6, groups=4, dtype=dtype),
        Case("conv3x3", 16, 16, 16, batch=1, size=6, scheme=3, dtype=dtype),
        Case("conv1x1", 16, 32, 5, batch=1, size=6, dtype=dtype),
        Case("linear", 32, 48, 9, rows=1, bias=True, dtype=dtype),
        Case("linear", 32, 48, 9, rows=20, bias=True),
        Case("qkv", 32, 32, 8, rows=2, bias=True, dtype=dtype),
    ]
