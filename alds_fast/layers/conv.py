"""Low-rank convolutions: a grouped encoder, then a decoder, each a convolution along its own axes of the kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError, BackendError
from ..kernels import lowrank_conv2d, why_not_fused_conv2d
from ..linalg import Decomposition, Pivots, WeightShape, decoder_axes
from .base import LowRankLayer

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _tuple(value: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    return (value,) * ndim if isinstance(value, int) else tuple(value)


def _axis_padding(
    padding: int | tuple[int, ...] | str, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """(before, after) of every axis; "same" puts the odd one after, as torch does."""
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((t // 2, t - t // 2) for t in totals)
    return tuple((p, p) for p in _tuple(0 if isinstance(padding, str) else padding, len(kernel)))


class _HalfConv:
    """Stride, padding and dilation of one of the two convolutions: its own axes only, neutral on the others."""

    def __init__(self, layer: LowRankConv, axes: tuple[int, ...], conv_groups: int) -> None:
        def own(values: tuple, neutral: Any) -> tuple:
            return tuple(v if a in axes else neutral for a, v in enumerate(values))

        self.stride, self.dilation = own(layer.stride, 1), own(layer.dilation, 1)
        pads = own(_axis_padding(layer.padding, layer.kernel_size, layer.dilation), (0, 0))
        native = layer.padding_mode == "zeros" and all(before == after for before, after in pads)
        self.padding = tuple(p[0] if native else 0 for p in pads)
        self.pad = [] if native or not any(map(any, pads)) else [n for p in reversed(pads) for n in p]
        self.mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        self.groups, self.conv = conv_groups, _CONV[layer.ndim]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.pad:
            x = F.pad(x, self.pad, self.mode)
        return self.conv(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def module(self, layer: LowRankConv, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """The same as an ``nn.Conv1d``, 2d or 3d that holds these very parameters; ``layer``: whose half it is."""
        options: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        if self.pad:
            padding = "same" if layer.padding == "same" else tuple(self.pad[-2::-2])
            options |= {"padding": padding, "padding_mode": layer.padding_mode}
        options |= {"groups": self.groups, "bias": bias is not None, "device": "meta"}
        out_channels, in_channels, *kernel = weight.shape
        conv: nn.Module = layer._dense(in_channels * self.groups, out_channels, tuple(kernel), **options)
        conv.weight = weight
        if bias is not None:
            conv.bias = bias
        return conv


class LowRankConv(LowRankLayer):
    """Convolution of rank ``rank`` per channel slice; see :class:`LowRankConv2d`."""

    ndim: int
    _dense: Any
    _options: tuple[str, ...] = ("stride", "padding", "dilation", "padding_mode")
    transposed = False
    dense_attributes = (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
        *("transposed", "output_padding", "padding_mode"),
    )

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int,
        *,
        scheme: int = 0,
        groups: int = 1,
        pivots: Pivots = "",
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        conv_groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        try:  # what torch refuses for the dense layer is refused here
            options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": conv_groups}
            sizes = [_tuple(v, self.ndim) for v in (kernel_size, stride, dilation)]
            self._dense(in_channels, out_channels, sizes[0], **options, padding_mode=padding_mode, device="meta")
            if any(len(s) != self.ndim for s in sizes) or (isinstance(padding, tuple) and len(padding) != self.ndim):
                raise ValueError(f"expected {self.ndim} sizes per option")
        except (TypeError, ValueError, RuntimeError) as e:
            raise ArgumentError(f"{type(self).__name__}({in_channels}, {out_channels}, {kernel_size}): {e}") from e
        shape = WeightShape(out_channels, in_channels, _tuple(kernel_size, self.ndim), conv_groups)
        super().__init__(shape, Decomposition(scheme, groups, rank, pivots), bias, device, dtype)
        self.stride, self.dilation = _tuple(stride, self.ndim), _tuple(dilation, self.ndim)
        self.padding = padding if isinstance(padding, str) else _tuple(padding, self.ndim)
        self.padding_mode = padding_mode
        self._encode, self._decode = self._halves()

    def _halves(self) -> tuple[Any, Any]:
        decoder = decoder_axes(self.scheme, self.kernel_size)
        encoder = tuple(a for a in range(self.ndim) if a not in decoder)
        return _HalfConv(self, encoder, self.groups_of_encoder), _HalfConv(self, decoder, self.groups)

    @property
    def in_channels(self) -> int:
        """As of the dense layer."""
        return self.weight_shape.in_channels

    @property
    def out_channels(self) -> int:
        """As of the dense layer."""
        return self.weight_shape.out_channels

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """As of the dense layer."""
        return self.weight_shape.kernel

    @property
    def groups(self) -> int:
        """As of the dense layer: the groups of the convolution, which the constructor takes as ``conv_groups``."""
        return self.weight_shape.conv_groups

    @property
    def output_padding(self) -> tuple[int, ...]:
        """As of the dense layer, which is not transposed: zeros."""
        return (0,) * self.ndim

    @classmethod
    def shaped_like(cls, conv: Any, decomposition: Decomposition) -> LowRankConv:
        """The layer that replaces ``conv``, its factors and bias on the meta device."""
        options = {name: getattr(conv, name) for name in cls._options} | decomposition.to_dict()
        options |= {"conv_groups": conv.groups, "bias": conv.bias is not None, "device": "meta"}
        return cls(conv.in_channels, conv.out_channels, conv.kernel_size, **options)

    @classmethod
    def from_dense(cls, conv: Any, *, rank: int, groups: int = 1, scheme: int = 0, pivots: Pivots = "") -> LowRankConv:
        """The layer of that rank whose weight is nearest to that of ``conv`` (Frobenius), of its type and device.

        ``conv`` is the nn.Conv1d, 2d or 3d of as many dimensions, of any stride, padding, dilation, padding mode and
        groups; ``groups`` here is the number of channel slices. Raises ArgumentError for any other type and as the
        constructor; WeightError for NaN or infinity.
        """
        if not isinstance(conv, cls._dense):
            raise ArgumentError(f"from_dense takes an nn.{cls._dense.__name__}, got {type(conv).__name__}")
        new = cls.shaped_like(conv, Decomposition(scheme, groups, rank, pivots))
        new._take_factors_of(conv)
        return new

    def forward(self, input: Tensor) -> Tensor:
        if self.pivots:
            return self._pivoted(input)
        if self.backend == "fused":
            reason = self.why_not_fused(input)
            raise BackendError(f"backend='fused' cannot run {self}: {reason}; use 'two-op' or 'auto'")
        return self._decode(self._encode(input, self.encoder, None), self.decoder, self.bias)

    def _pivoted(self, x: Tensor) -> Tensor:
        self._check_pivoted(x)
        channels = -1 - self.ndim
        if self.pivots == "output":
            hidden = self._encode(x, self.encoder, None)
            rest = self._decode(hidden, self.decoder, None)
            y = torch.cat([hidden, rest], channels)
            y = y if self.in_order else y.index_select(channels, self.order)
            return y if self.bias is None else y + self.bias.to(y.dtype).reshape(-1, *(1,) * self.ndim)
        sizes = [self.groups_of_encoder * self.rank]
        pivots, rest = x.index_select(channels, self.order).tensor_split(sizes, channels)
        return self._decode(pivots + self._encode(rest, self.encoder, None), self.decoder, self.bias)

    def why_not_fused(self, x: Tensor) -> str | None:
        """That there is no kernel."""
        return f"there is no kernel for {self.ndim}-d convolutions"

    def _conv_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._options}

    def dense_module(self) -> nn.Module:
        """The ``nn.Conv1d``, 2d or 3d that the layer stands for, on the meta device."""
        options = self._conv_options() | {"groups": self.groups, "bias": self.bias is not None, "device": "meta"}
        return self._dense(self.in_channels, self.out_channels, self.kernel_size, **options)

    def half_modules(self, bias: Tensor | None) -> tuple[nn.Module, nn.Module]:
        """Encoder and decoder as torch's convolutions that hold these very parameters, the decoder with that bias."""
        return self._encode.module(self, self.encoder, None), self._decode.module(self, self.decoder, bias)

    def extra_repr(self) -> str:
        defaults = ((1,) * self.ndim, (0,) * self.ndim, (1,) * self.ndim, "zeros", (0,) * self.ndim)
        options = zip(self._conv_options().items(), defaults, strict=False)
        shown = [f"{k}={v!r}" for (k, v), default in options if v != default]
        if self.groups > 1:
            shown.append(f"conv_groups={self.groups}")
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return ", ".join([sizes, *shown, self._structure()])


class LowRankConv1d(LowRankConv):
    """One-dimensional :class:`LowRankConv2d`; schemes 0 (encode) and 3 (decode), x (N, C, L) or (C, L)."""

    ndim, _dense = 1, nn.Conv1d


class LowRankConv2d(LowRankConv):
    """Convolution whose channel slices have rank ``rank``: a grouped encoder, then a decoder.

    Takes the arguments of ``nn.Conv2d`` with ``groups`` called ``conv_groups``, and scheme, groups (channel slices),
    rank and pivots (:mod:`alds_fast.linalg.pivots`). x is (N, C, H, W) or (C, H, W). Stride, padding and dilation of an
    axis go to whichever half has that axis of the kernel. Raises ArgumentError for groups that do not divide
    in_channels / conv_groups or a rank outside 1..full. ``.slices`` counts channel slices, ``.groups`` is torch's.

    >>> LowRankConv2d(64, 128, 3, rank=8, groups=4, padding=1)
    LowRankConv2d(64, 128, kernel_size=(3, 3), padding=(1, 1), scheme=0, groups=4, rank=8)
    """

    ndim, _dense = 2, nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        if self.pivots or self._two_op(input):
            return super().forward(input)
        late = self._decode.pad and (self._encode.pad or self.backend != "fused")
        if self._structural_reason() is not None or late:
            return super().forward(input)
        x = input if input.dim() == 4 else input[None]
        if pad := self._encode.pad or self._decode.pad:
            x = F.pad(x, pad, self._encode.mode)  # less work before the decoder; it commutes with a 1 x 1 encoder
        y = lowrank_conv2d(x, self.encoder, self.decoder, self.bias, backend=self.backend, **self._in_kernels())
        return y if input.dim() == 4 else y[0]

    def _in_kernels(self) -> dict[str, Any]:
        padding = [a + b for a, b in zip(self._encode.padding, self._decode.padding, strict=True)]
        return {"stride": self.stride, "padding": padding, "dilation": self.dilation, "groups": self.slices}

    def _structural_reason(self) -> str | None:
        grouped = "the convolution is grouped itself (conv_groups > 1)" if self.groups > 1 else None
        return grouped or self._why_pivots_are_not_fused()

    def why_not_fused(self, x: Tensor) -> str | None:
        """Why the 2-d kernel cannot run this layer on ``x``; None if it can."""
        return self._structural_reason() or why_not_fused_conv2d(x, self.encoder, self.decoder, **self._in_kernels())


class LowRankConv3d(LowRankConv):
    """Three-dimensional :class:`LowRankConv2d`; scheme 1 decodes along the first kernel axis, 2 along the others."""

    ndim, _dense = 3, nn.Conv3d
