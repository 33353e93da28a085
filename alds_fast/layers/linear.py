"""The low-rank form of nn.Linear."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError
from ..kernels import in_this_order, lowrank_linear, lowrank_linear_ref, why_not_fused_linear
from ..linalg import Decomposition, Pivots, WeightShape
from .base import LowRankLayer


class LowRankLinear(LowRankLayer):
    """Linear layer of rank ``rank`` per input slice: y = decoder @ blockdiag(encoder) @ x + bias.

    Shapes: x (..., in_features) to (..., out_features); encoder (groups * rank, in_features / groups), decoder
    (out_features, groups * rank). Raises ArgumentError for groups that do not divide in_features or a rank outside
    1..min(out_features, in_features / groups).

    With ``pivots`` the factors are stored without an identity (:mod:`alds_fast.linalg.pivots`): "output", of one slice,
    with a decoder (out_features - rank, rank), or "input" with an encoder (groups * rank, in_features / groups - rank).

    Attributes of ``nn.Linear`` are here with their meaning. ``slices`` is the number of input slices, which the
    constructor takes as ``groups``; as ``nn.Linear`` has no groups, ``.groups`` is another name of it.

    >>> LowRankLinear(64, 32, rank=4, groups=2)
    LowRankLinear(in_features=64, out_features=32, scheme=0, groups=2, rank=4)
    """

    dense_attributes = ("in_features", "out_features")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        scheme: int = 0,
        groups: int = 1,
        pivots: Pivots = "",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        decomposition = Decomposition(scheme, groups, rank, pivots)
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
    def from_dense(
        cls, linear: nn.Linear, *, rank: int, groups: int = 1, scheme: int = 0, pivots: Pivots = ""
    ) -> LowRankLinear:
        """The layer of that rank whose weight is nearest to that of ``linear`` (Frobenius), of its type and device.

        Raises ArgumentError for anything but an nn.Linear and as the constructor; WeightError for NaN or infinity.

        >>> LowRankLinear.from_dense(nn.Linear(64, 32), rank=4)
        LowRankLinear(in_features=64, out_features=32, scheme=0, groups=1, rank=4)
        """
        if not isinstance(linear, nn.Linear):
            raise ArgumentError(f"from_dense takes an nn.Linear, got {type(linear).__name__}")
        sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
        options: dict[str, Any] = {"scheme": scheme, "groups": groups, "pivots": pivots}
        new = cls(*sizes, rank, **options, bias=bias, device="meta")
        new._take_factors_of(linear)
        return new

    def forward(self, input: Tensor) -> Tensor:
        if self.pivots == "input":
            return self._with_input_pivots(input)
        order = self.order if self.pivots else None
        factors = self.encoder, self.decoder, self.bias
        if self._two_op(input):
            return lowrank_linear_ref(input, *factors, None, self.slices, None, order, self.in_order)
        return lowrank_linear(input, *factors, groups=self.slices, order=order, backend=self.backend)

    def _with_input_pivots(self, x: Tensor) -> Tensor:
        self._check_pivoted(x)
        sorted_x = in_this_order(x, self.order)
        inner = self.slices * self.rank
        chosen, rest = sorted_x[..., :inner], sorted_x[..., inner:].unflatten(-1, (self.slices, -1))
        blocks = self.encoder.unflatten(0, (self.slices, -1))
        told = torch.bmm(rest.reshape(-1, *rest.shape[-2:]).transpose(0, 1), blocks.transpose(1, 2))
        told = told.transpose(0, 1).reshape(chosen.shape)
        return F.linear(chosen + told, self.decoder, self.bias)

    def why_not_fused(self, x: Tensor) -> str | None:
        """Why the fused kernel cannot run this layer on ``x``; None if it can."""
        reason = self._why_pivots_are_not_fused() if self.pivots == "input" else None
        return reason or why_not_fused_linear(x, self.encoder)

    def dense_module(self) -> nn.Module:
        """The ``nn.Linear`` that the layer stands for, on the meta device."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        if "dense_shape" in vars(self):
            vars(dense)["dense_shape"] = self.dense_shape
        return dense

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._structure()}"
