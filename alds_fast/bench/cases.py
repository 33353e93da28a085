"""The operations that are timed: shapes, random tensors, and the ways to compute each.

A case is one operation at one size. ``sides`` are what takes turns: "dense", "two_op" (library calls), "fused", for
some "padded" (the grouped encoder as a dense one with zeros), "separate" (three fused layers instead of merged ones)
and "merged_two_op" (one encoder call for three layers), and functions that users have registered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import lowrank_conv2d, lowrank_linear, lowrank_linears
from .registered import CONV, LINEAR, functions_of

Tensors = dict[str, Any]


@dataclass(frozen=True)
class Operation:
    """``op`` is "linear", "qkv" or like "conv3x3"; ``q`` = groups * rank (of each layer for "qkv").

    ``rows`` are those of linears; ``batch`` and ``size`` are of convolutions, which keep the size. ``aim`` is what the
    design expects of an H100: dense / deployed and two-op / deployed. Cases of ``priority`` 0 run first; ``compiled``
    ones are also timed under torch.compile, if time is left.
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
        """Taps along an axis."""
        return int(self.op.rpartition("x")[2]) if self.is_conv else 1

    @property
    def layers(self) -> int:
        """How many read one input."""
        return 3 if self.op == "qkv" else 1

    @property
    def is_conv(self) -> bool:
        """Whether it is a convolution."""
        return self.op.startswith(CONV)

    @property
    def key(self) -> str:
        """Its name."""
        size = f"b{self.batch} {self.size}x{self.size}" if self.is_conv else f"m{self.rows}"
        extra = (f" g{self.groups}" if self.groups > 1 else "") + (f" scheme{self.scheme}" if self.scheme else "")
        name = f"{self.op} {self.channels}->{self.filters} {size} q{self.q}{extra}"
        return name if self.dtype == "bfloat16" else f"{name} {self.dtype}"

    @property
    def shape(self) -> dict[str, int]:
        """Its sizes, by name."""
        names = ("batch", "size", "kernel", "scheme") if self.is_conv else ("rows", "layers")
        return {n: getattr(self, n) for n in ("channels", "filters", "q", "groups", *names)}

    @property
    def positions(self) -> int:
        """Rows, or pixels of all images."""
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
        about: dict[str, Any] = {
            "name": self.key,
            "op": self.op,
            "shape": self.shape,
            "dtype": self.dtype,
            "aim": self.aim,
        }
        about |= {"flop_reduction": self.reduction(), "deployed": None, "interpreted": False, "copies": None}
        return (
            about
            | dict.fromkeys(measured)
            | {"quantiles": {}, "gains": {}, "errors": {}, "reasons": {}, "errors_ok": None, "error": None}
        )


def make(case: Operation, device: torch.device, seed: int = 0) -> Tensors:
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


def compose(encoder: Tensor, decoder: Tensor, case: Operation) -> Tensor:
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


def every_tensor(tensors: Tensors, *names: str) -> list[Tensor]:
    """The named ones, or all, one after the other."""
    values = [tensors[n] if isinstance(tensors[n], list) else [tensors[n]] for n in names or tensors]
    return [t for several in values for t in several if t is not None]


def size_bytes(tensors: Tensors, *names: str) -> int:
    """Of the named tensors."""
    return sum(t.numel() * t.element_size() for t in every_tensor(tensors, *names))


def roofline_bytes(case: Operation, tensors: Tensors) -> int:
    """Input, factors and biases read once, output written once."""
    out = case.positions * case.filters * case.layers * tensors["x"].element_size()
    return size_bytes(tensors, "x", "encoder", "decoders", "biases") + out


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """With the padding that keeps the size."""
    return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)


def lowrank(case: Operation, t: Tensors, backend: str) -> Tensor:
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


def sides(case: Operation) -> dict[str, Callable[[Tensors], Any]]:
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
    calls: dict[str, Callable[[Tensors], Any]] = {
        "dense": lambda t: dense(t["x"], t["weights"][0], t["biases"][0]),
        "two_op": lambda t: lowrank(case, t, "two-op"),
        "fused": lambda t: lowrank(case, t, "fused"),
    }
    for name, function in functions_of(CONV if case.is_conv else LINEAR):
        calls[name] = _of_user(case, function)
    if case.groups > 1 and case.is_conv and case.scheme == 0:
        calls["padded"] = lambda t: F.conv2d(convolve(t["x"], t["full"], None), t["decoders"][0], t["biases"][0])
    return calls


def _of_user(case: Operation, function: Callable[..., Tensor]) -> Callable[[Tensors], Tensor]:
    options = {"groups": case.groups} | ({"padding": case.kernel // 2} if case.is_conv else {})
    return lambda t: function(t["x"], t["encoder"], t["decoders"][0], t["biases"][0], **options)


def two_op(case: Operation) -> Callable[[Tensors], Any]:
    """The call that torch.compile gets."""
    return sides(case)["two_op"]


def exact_result(case: Operation, tensors: Tensors) -> list[Tensor]:
    """The result in float64 from the same rounded factors."""
    exact = {n: [None if t is None else t.double() for t in v] if isinstance(v, list) else v.double()
             for n, v in tensors.items() if n != "weights"}  # fmt: skip
    if case.op == "qkv":
        return three(exact, "two-op")
    return [lowrank(case, exact, "two-op")]
