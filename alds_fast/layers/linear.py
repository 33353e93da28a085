"""The low-rank form of nn.Linear."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..kernels import lowrank_linear, lowrank_linear_ref, why_not_fused_linear
from ..linalg import Decomposition, WeightShape
from .base import LowRankLayer


def _linear(weight: nn.Parameter, bias: Tensor | None = None) -> nn.Linear:
    """The ``nn.Linear`` that holds these very parameters."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = bias  # type: ignore[assignment]
    return linear


class SlicedLinear(nn.Module):
    """An ``nn.Linear`` for each of the equal slices of the last dimension, their outputs one after the other.

    x (..., sum of in_features) to (..., sum of out_features). The encoder of a low-rank linear layer with slices, in a
    form that traces and scripts and whose parameters every tool finds.
    """

    def __init__(self, slices: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.slices = nn.ModuleList(slices)

    def forward(self, input: Tensor) -> Tensor:
        parts = input.chunk(len(self.slices), -1)
        outputs = []
        for i, linear in enumerate(self.slices):
            outputs.append(linear(parts[i]))
        return torch.cat(outputs, -1)


class LowRankLinear(LowRankLayer):
    """Linear layer of rank ``rank`` per input slice: y = decoder @ blockdiag(encoder) @ x + bias.

    Shapes: x (..., in_features) to (..., out_features); encoder (groups * rank, in_features / groups), decoder
    (out_features, groups * rank). Raises ArgumentError for groups that do not divide in_features or a rank outside
    1..min(out_features, in_features / groups).

    Attributes of ``nn.Linear`` are here with their meaning. ``slices`` is the number of input slices, which the
    constructor takes as ``groups``; as ``nn.Linear`` has no groups, ``.groups`` is another name of it.

    >>> LowRankLinear(64, 32, rank=4, groups=2)
    LowRankLinear(in_features=64, out_features=32, scheme=0, groups=2, rank=4)
    """

    _dense_attributes = ("in_features", "out_features")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        scheme: int = 0,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        decomposition = Decomposition(scheme, groups, rank)
        super().__init__(WeightShape(out_features, in_features), decomposition, bias, device, dtype)

    @property
    def in_features(self) -> int:
        """As of ``nn.Linear``."""
        return self.weight_shape.in_channels

    @property
    def out_features(self) -> int:
        """As of ``nn.Linear``."""
        return self.weight_shape.out_channels

    @property
    def groups(self) -> int:
        """The number of input slices, as ``slices``."""
        return self.slices

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, rank: int, groups: int = 1, scheme: int = 0) -> LowRankLinear:
        """The layer of that rank whose weight is nearest to that of ``linear`` (Frobenius), of its type and device.

        Raises ArgumentError for anything but an nn.Linear and as the constructor; WeightError for NaN or infinity.

        >>> LowRankLinear.from_dense(nn.Linear(64, 32), rank=4)
        LowRankLinear(in_features=64, out_features=32, scheme=0, groups=1, rank=4)
        """
        if not isinstance(linear, nn.Linear):
            raise ArgumentError(f"from_dense takes an nn.Linear, got {type(linear).__name__}")
        sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
        new = cls(*sizes, rank, scheme=scheme, groups=groups, bias=bias, device="meta")
        new._take_factors_of(linear)
        return new

    def forward(self, input: Tensor) -> Tensor:
        if self._two_op(input):
            return lowrank_linear_ref(input, self.encoder, self.decoder, self.bias, None, self.slices)
        return lowrank_linear(input, self.encoder, self.decoder, self.bias, groups=self.slices, backend=self.backend)

    def why_not_fused(self, x: Tensor) -> str | None:
        """Why the fused kernel cannot run this layer on ``x``; None if it can."""
        return why_not_fused_linear(x, self.encoder)

    def dense_module(self) -> nn.Module:
        """The ``nn.Linear`` that the layer stands for, on the meta device."""
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")

    def _plain_halves(self) -> tuple[nn.Module, nn.Module]:
        decoder = _linear(self.decoder, self.bias)
        if self.slices == 1:
            return _linear(self.encoder), decoder
        blocks, trained = self.encoder.detach().chunk(self.slices), self.encoder.requires_grad
        return SlicedLinear([_linear(nn.Parameter(block.clone(), trained)) for block in blocks]), decoder

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._structure()}"
