"""Low-rank layers: a grouped encoder, then a decoder, as plain trainable modules of two dense tensors and a bias."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ArgumentError
from .folding import (
    WeightShape,
    decoder_axes,
    distinct_schemes,
    divisors,
    factor_shapes,
    max_rank,
    weights_to_dense,
)

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _check_structure(shape: WeightShape, scheme: int, groups: int, rank: int) -> None:
    distinct_schemes((scheme,), shape.kernel)
    if not isinstance(groups, int) or groups < 1 or shape.slice_channels % groups:
        allowed = ", ".join(map(str, divisors(shape.slice_channels)))
        raise ArgumentError(f"groups={groups!r} does not divide {shape.slice_channels} channels; allowed: {allowed}")
    full = max_rank(shape, scheme, groups)
    if not isinstance(rank, int) or not 1 <= rank <= full:
        raise ArgumentError(f"rank={rank!r} is outside 1..{full} for scheme={scheme}, groups={groups}")


class LowRankLayer(nn.Module):
    """Base of the low-rank layers.

    Attributes:
        encoder, decoder: parameters, shapes by :func:`alds_fast.folding.factor_shapes`.
        bias: parameter (out_channels,) or None.
        weight_shape: the dense weight that they replace.
        scheme, groups, rank: the fold, the number of channel slices and the rank of each.
    """

    bias: Tensor | None

    def __init__(
        self,
        shape: WeightShape,
        scheme: int,
        groups: int,
        rank: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        _check_structure(shape, scheme, groups, rank)
        self.weight_shape, self.scheme, self.groups, self.rank = shape, scheme, groups, rank
        encoder, decoder = factor_shapes(shape, scheme, groups, rank)
        self.encoder = nn.Parameter(torch.empty(encoder, device=device, dtype=dtype))
        self.decoder = nn.Parameter(torch.empty(decoder, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(shape.out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise like ``nn.Linear`` and ``nn.Conv2d`` do, each factor by its own fan-in."""
        for factor in (self.encoder, self.decoder):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(math.prod(self.decoder.shape[1:]))
            nn.init.uniform_(self.bias, -bound, bound)

    def dense_weight(self) -> Tensor:
        """The dense weight that the factors stand for, of shape ``weight_shape.weight``, in their dtype."""
        factors = self.encoder.double(), self.decoder.double()
        return weights_to_dense(*factors, self.weight_shape, self.scheme, self.groups).to(self.encoder.dtype)

    def _empty_dense(self) -> nn.Module:
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        """The ``nn.Linear`` or ``nn.ConvNd`` with the recomposed weight and a copy of the bias."""
        dense = self._empty_dense()
        dense.weight = nn.Parameter(self.dense_weight().detach(), self.encoder.requires_grad)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return dense.train(self.training)

    def _structure(self) -> str:
        text = f"scheme={self.scheme}, groups={self.groups}, rank={self.rank}"
        return text if self.bias is not None else text + ", bias=False"


class LowRankLinear(LowRankLayer):
    """Linear layer of rank ``rank`` per input slice: y = decoder @ blockdiag(encoder) @ x + bias.

    Shapes: x (..., in_features) to (..., out_features); encoder (groups * rank, in_features / groups), decoder
    (out_features, groups * rank). Raises ArgumentError for groups that do not divide in_features or a rank outside
    1..min(out_features, in_features / groups).

    >>> LowRankLinear(64, 32, rank=4, groups=2)
    LowRankLinear(in_features=64, out_features=32, scheme=0, groups=2, rank=4)
    """

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
        super().__init__(WeightShape(out_features, in_features), scheme, groups, rank, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            hidden = F.linear(x, self.encoder)
        else:
            encoder = self.encoder.unflatten(0, (self.groups, self.rank))
            hidden = torch.einsum("...gc,grc->...gr", x.unflatten(-1, (self.groups, -1)), encoder).flatten(-2)
        return F.linear(hidden, self.decoder, self.bias)

    def _empty_dense(self) -> nn.Module:
        shape = self.weight_shape
        return nn.Linear(shape.in_channels, shape.out_channels, self.bias is not None, device="meta")

    def extra_repr(self) -> str:
        shape = self.weight_shape
        return f"in_features={shape.in_channels}, out_features={shape.out_channels}, {self._structure()}"


def _tuple(value: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    return (value,) * ndim if isinstance(value, int) else tuple(value)


def _axis_padding(
    padding: int | tuple[int, ...] | str, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """(before, after) of every axis; "same" puts the odd one after, as torch does."""
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((t // 2, t - t // 2) for t in totals)
    if isinstance(padding, str):
        return ((0, 0),) * len(kernel)
    return tuple((p, p) for p in _tuple(padding, len(kernel)))


class _HalfConv:
    """Stride, padding and dilation of one of the two convolutions: its own axes only, neutral on the others."""

    def __init__(self, layer: LowRankConv, axes: tuple[int, ...], conv_groups: int) -> None:
        def own(values: tuple, neutral: Any) -> tuple:
            return tuple(v if a in axes else neutral for a, v in enumerate(values))

        self.stride, self.dilation = own(layer.stride, 1), own(layer.dilation, 1)
        pads = own(_axis_padding(layer.padding, layer.weight_shape.kernel, layer.dilation), (0, 0))
        native = layer.padding_mode == "zeros" and all(before == after for before, after in pads)
        self.padding = tuple(p[0] if native else 0 for p in pads)
        self.pad = [] if native or not any(map(any, pads)) else [n for p in reversed(pads) for n in p]
        self.mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        self.groups, self.conv = conv_groups, _CONV[layer.ndim]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.pad:
            x = F.pad(x, self.pad, self.mode)
        return self.conv(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class LowRankConv(LowRankLayer):
    """Convolution of rank ``rank`` per channel slice; see :class:`LowRankConv2d`."""

    ndim: int
    _dense: type[nn.Module]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int,
        *,
        scheme: int = 0,
        groups: int = 1,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        conv_groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = WeightShape(out_channels, in_channels, _tuple(kernel_size, self.ndim), conv_groups)
        super().__init__(shape, scheme, groups, rank, bias, device, dtype)
        self.stride, self.dilation = _tuple(stride, self.ndim), _tuple(dilation, self.ndim)
        self.padding = padding if isinstance(padding, str) else _tuple(padding, self.ndim)
        self.padding_mode = padding_mode
        decoder = decoder_axes(scheme, shape.kernel)
        encoder = tuple(a for a in range(self.ndim) if a not in decoder)
        self._encode = _HalfConv(self, encoder, conv_groups * groups)
        self._decode = _HalfConv(self, decoder, conv_groups)

    def forward(self, x: Tensor) -> Tensor:
        return self._decode(self._encode(x, self.encoder, None), self.decoder, self.bias)

    def _conv_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "padding_mode")}

    def _empty_dense(self) -> nn.Module:
        shape, options = self.weight_shape, self._conv_options()
        options |= {"groups": shape.conv_groups, "bias": self.bias is not None, "device": "meta"}
        return self._dense(shape.in_channels, shape.out_channels, shape.kernel, **options)

    def extra_repr(self) -> str:
        shape, defaults = self.weight_shape, ((1,) * self.ndim, (0,) * self.ndim, (1,) * self.ndim, "zeros")
        options = zip(self._conv_options().items(), defaults, strict=True)
        shown = [f"{k}={v!r}" for (k, v), default in options if v != default]
        if shape.conv_groups > 1:
            shown.append(f"conv_groups={shape.conv_groups}")
        head = f"{shape.in_channels}, {shape.out_channels}, kernel_size={shape.kernel}"
        return ", ".join([head, *shown, self._structure()])


class LowRankConv1d(LowRankConv):
    """One-dimensional :class:`LowRankConv2d`; schemes 0 (encode) and 3 (decode), x (N, C, L) or (C, L)."""

    ndim, _dense = 1, nn.Conv1d


class LowRankConv2d(LowRankConv):
    """Convolution whose channel slices have rank ``rank``: a grouped encoder, then a decoder.

    Takes the arguments of ``nn.Conv2d`` with ``groups`` called ``conv_groups``, and scheme, groups (channel slices),
    rank. x is (N, C, H, W) or (C, H, W). Stride, padding and dilation of an axis go to whichever half has that axis
    of the kernel, so the result equals the dense layer's for the recomposed weight (:meth:`to_dense`). Raises
    ArgumentError for groups that do not divide in_channels / conv_groups or a rank outside 1..full.

    >>> LowRankConv2d(64, 128, 3, rank=8, groups=4, padding=1)
    LowRankConv2d(64, 128, kernel_size=(3, 3), padding=(1, 1), scheme=0, groups=4, rank=8)
    """

    ndim, _dense = 2, nn.Conv2d


class LowRankConv3d(LowRankConv):
    """Three-dimensional :class:`LowRankConv2d`; scheme 1 decodes along the first kernel axis, 2 along the others."""

    ndim, _dense = 3, nn.Conv3d
