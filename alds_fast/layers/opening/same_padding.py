"""timm's convolutions that pad so that the output has the size of the input over the stride, rounded up."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .folded import is_standardised, of_timm, with_parameters, with_standardised_weight

_KEPT = ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups")


class SamePadded(nn.Module):
    """Pads, by how large its input is, and calls ``conv``, a convolution without padding, whose sizes it has.

    >>> import torch
    >>> SamePadded(nn.Conv2d(3, 8, 3, stride=2))(torch.ones(1, 3, 8, 7)).shape
    torch.Size([1, 8, 4, 4])
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        for name in _KEPT:
            setattr(self, name, getattr(conv, name))
        self.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        conv: Any = self.conv
        pads: list[int] = []
        for size, kernel, stride, dilation in zip(
            input.shape[-2:], conv.kernel_size, conv.stride, conv.dilation, strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
            pads = [total // 2, total - total // 2, *pads]
        y: Tensor = conv(F.pad(input, pads))
        return y


def pads_to_same(module: nn.Module) -> bool:
    """Whether it is a convolution of timm that pads by how large its input is."""
    return of_timm(module, {"Conv2dSame"}) or (is_standardised(module) and bool(getattr(module, "same_pad", False)))


def same_padded(module: nn.Module) -> SamePadded:
    """The convolution with its padding as a module of its own."""
    conv: Any = module
    if is_standardised(conv):
        return SamePadded(with_standardised_weight(conv))
    return SamePadded(with_parameters(conv, nn.Conv2d))
