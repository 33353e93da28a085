"""The low-rank form of nn.Linear whose factors are stored as int8."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...kernels import dequantized, lowrank_linear, quantized_rows
from ...linalg import with_identity
from ..linear import LowRankLinear

_FACTORS = ("encoder", "decoder")


class Int8LowRankLinear(LowRankLinear):
    """A :class:`LowRankLinear` with int8 factors and a scale for every row of them, as quantize_factors makes it.

    The buffers ``encoder_int8``, ``encoder_scale``, ``decoder_int8`` and ``decoder_scale`` take the place of the
    parameters. ``.to(dtype)`` converts the scales, whose type is the layer's. ``encoder`` and ``decoder`` are computed
    from them at every access and cannot be set. Only the bias can be trained; gradients of the input are there.

    Up to 16 rows the fused kernel reads the integers. Everything else runs with the dequantised factors.
    """

    encoder_int8: Tensor
    encoder_scale: Tensor
    decoder_int8: Tensor
    decoder_scale: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ModelError("layers with int8 factors are made by alds_fast.quantize_factors(model), not one by one")

    @classmethod
    def of(cls, layer: LowRankLinear) -> Int8LowRankLinear:
        """A copy of the layer with int8 factors."""
        factors = {name: getattr(layer, name) for name in _FACTORS}
        new: Any = copy.deepcopy(layer, {id(f): nn.Parameter(f.new_empty(0)) for f in factors.values()})
        new.__class__ = cls
        for name, factor in factors.items():
            del new._parameters[name]
            values, scale = quantized_rows(factor)
            new.register_buffer(f"{name}_int8", values)
            new.register_buffer(f"{name}_scale", scale)
        int8: Int8LowRankLinear = new
        return int8

    @property
    def encoder(self) -> Tensor:  # type: ignore[override]
        """The encoder, dequantised."""
        return dequantized(self.encoder_int8, self.encoder_scale)

    @property
    def decoder(self) -> Tensor:  # type: ignore[override]
        """The decoder, dequantised."""
        return dequantized(self.decoder_int8, self.decoder_scale)

    def merged_parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Integers and scales of encoder and decoder of a layer of one slice, the identity of pivots filled in."""
        values, scale = self.decoder_int8, self.decoder_scale
        if self.pivots:
            fold = self.decomposition.fold
            _, values = with_identity(self.encoder_int8, values, self.order, self.weight_shape, fold, self.pivots)
            scale = torch.cat([scale.new_ones(self.rank), scale]).index_select(0, self.order)
        return self.encoder_int8, self.encoder_scale, values, scale

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FACTORS:
            raise AttributeError(
                f"{type(self).__name__}.{name} is int8 and cannot be set; set that of the model before "
                f"quantize_factors, and quantise anew"
            )
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Refused: there is nothing to train."""
        raise ModelError(f"{self}: int8 factors are not initialised; quantise a layer that is")

    def forward(self, input: Tensor) -> Tensor:
        if self.pivots == "input" or self._two_op(input):
            return super().forward(input)
        return lowrank_linear(
            input, self.encoder_int8, self.decoder_int8, self.bias, groups=self.slices,
            order=self.order if self.pivots else None, scales=(self.encoder_scale, self.decoder_scale),
            backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8"
