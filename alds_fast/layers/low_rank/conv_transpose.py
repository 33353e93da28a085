"""Low-rank transposed convolutions: a grouped encoder, then a decoder, each along its own axes of the kernel.

What a transposed convolution adds to an output is a matrix of (filters, channels x kernel) times what lies under it, as
that of a convolution is, so that it has the same folds. Its weight is stored with the channels first,
(in_channels, out_channels / groups, *kernel); here, as everywhere in this library, filters come first.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...linalg import decoder_axes
from ..conv import LowRankConv

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_PLAIN: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def swap_channels(weight: Tensor, groups: int) -> Tensor:
    """(groups * a, b, *kernel) as (groups * b, a, *kernel): from channels first to filters first, and back.

    >>> swap_channels(torch.empty(6, 4, 3, 3, device="meta"), 2).shape
    torch.Size([8, 3, 3, 3])
    """
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


class _HalfTransposed:
    """One of the two halves, with stride, padding, dilation and output padding of its own axes only.

    A half without any is a convolution of kernel 1.
    """

    def __init__(self, layer: LowRankConvTranspose, axes: tuple[int, ...], conv_groups: int, extra: tuple[int, ...]):
        def own(values: tuple[int, ...], neutral: int) -> tuple[int, ...]:
            return tuple(v if a in axes else neutral for a, v in enumerate(values))

        self.stride, self.dilation = own(layer.stride, 1), own(layer.dilation, 1)
        self.padding, self.output_padding = own(layer.padding, 0), own(extra, 0)
        kernel = own(layer.kernel_size, 1)
        self.plain = {*kernel, *self.stride} == {1} and {*self.padding, *self.output_padding} == {0}
        self.groups, self.ndim = conv_groups, layer.ndim
        self.pad: list[int] = []

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.plain:
            y: Tensor = _PLAIN[self.ndim](x, weight, bias, groups=self.groups)
            return y
        options = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        return _TRANSPOSED[self.ndim](x, swap_channels(weight, self.groups), bias, *options)

    def module(self, layer: LowRankConv, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """The same as a module of torch: a transposed one, with a copy of the weight, or one with this very weight."""
        out_channels, in_channels, *kernel = weight.shape
        options: dict[str, Any] = {"groups": self.groups, "bias": bias is not None, "device": "meta"}
        kind = _CONVS[self.ndim]
        if not self.plain:
            options |= {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
            options["output_padding"], kind = self.output_padding, layer._dense
            swapped = swap_channels(weight.detach(), self.groups).clone(memory_format=torch.contiguous_format)
            weight = nn.Parameter(swapped, weight.requires_grad)
        conv: nn.Module = kind(in_channels * self.groups, out_channels, tuple(kernel), **options)
        conv.weight = weight
        if bias is not None:
            conv.bias = bias
        return conv


class LowRankConvTranspose(LowRankConv):
    """Transposed convolution of rank ``rank`` per channel slice; see :class:`LowRankConvTranspose2d`."""

    transposed = True
    padding: tuple[int, ...]
    _options = ("stride", "padding", "dilation", "padding_mode", "output_padding")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int,
        *,
        output_padding: int | tuple[int, ...] = 0,
        **options: Any,
    ) -> None:
        self._extra = (output_padding,) * self.ndim if isinstance(output_padding, int) else tuple(output_padding)
        super().__init__(in_channels, out_channels, kernel_size, rank, **options)

    @property
    def output_padding(self) -> tuple[int, ...]:
        """As of the dense layer."""
        return self._extra

    @property
    def encoder_axes(self) -> list[int]:
        """The axes of the kernel that the encoder goes along; the decoder goes along the others."""
        decoder = decoder_axes(self.scheme, self.kernel_size)
        return [a for a in range(self.ndim) if a not in decoder]

    def _halves(self) -> tuple[Any, Any]:
        return self._halves_with(self._extra)

    def _halves_with(self, extra: tuple[int, ...]) -> tuple[_HalfTransposed, _HalfTransposed]:
        encoder = _HalfTransposed(self, tuple(self.encoder_axes), self.groups_of_encoder, extra)
        return encoder, _HalfTransposed(self, decoder_axes(self.scheme, self.kernel_size), self.groups, extra)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """``output_size`` as of ``nn.ConvTranspose2d``."""
        if output_size is None:
            return super().forward(input)
        options = self.stride, self.padding, self.kernel_size, self.ndim, self.dilation
        extra = self._dense._output_padding(self, input, output_size, *options)
        layer = copy.copy(self)
        vars(layer).update(zip(("_encode", "_decode"), self._halves_with(tuple(extra)), strict=True))
        return LowRankConv.forward(layer, input)

    def why_not_fused(self, x: Tensor) -> str | None:
        """That there is no kernel."""
        return "there is no kernel for transposed convolutions"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the weight as the dense module has it."""
        return (self.in_channels, self.weight_shape.filters_per_group, *self.kernel_size)

    def as_stored(self, weight: Tensor) -> Tensor:
        """A weight with the filters first as the dense module has it, and the other way round."""
        return swap_channels(weight, self.groups)


class LowRankConvTranspose1d(LowRankConvTranspose):
    """One-dimensional :class:`LowRankConvTranspose2d`; schemes 0 (encode) and 3 (decode), x (N, C, L) or (C, L)."""

    ndim, _dense = 1, nn.ConvTranspose1d


class LowRankConvTranspose2d(LowRankConvTranspose):
    """Transposed convolution whose channel slices have rank ``rank``: a grouped encoder, then a decoder.

    Takes the arguments of ``nn.ConvTranspose2d`` with ``groups`` called ``conv_groups``, and scheme, groups (channel
    slices), rank and pivots, as :class:`alds_fast.LowRankConv2d`, whose factors it has: encoder
    (conv_groups * groups * rank, c / groups, *kernel) and decoder (out_channels, groups * rank, *kernel), filters
    first. x is (N, C, H, W) or (C, H, W). There is no fused kernel: it runs as two calls of the library. Raises
    ArgumentError as that.

    >>> LowRankConvTranspose2d(64, 32, 4, rank=8, stride=2, padding=1, output_padding=1)
    LowRankConvTranspose2d(64, 32, kernel_size=(4, 4), stride=(2, 2), padding=(1, 1), output_padding=(1, 1), scheme=0, groups=1, rank=8)
    """  # noqa: E501

    ndim, _dense = 2, nn.ConvTranspose2d


class LowRankConvTranspose3d(LowRankConvTranspose):
    """Three-dimensional :class:`LowRankConvTranspose2d`."""

    ndim, _dense = 3, nn.ConvTranspose3d
