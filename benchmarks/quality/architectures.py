"""The networks that are trained here, written plainly and narrow enough for minutes of one CPU thread.

All of them take (images, 1, 28, 28) and return (images, 10) logits. The convolutional ones halve the resolution in
their first layer, or early, because the originals were made for 32 x 32 colour images and thirty times the time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


def conv_bn(channels: int, filters: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution and batch normalisation."""
    convolution = nn.Conv2d(channels, filters, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(filters))


def bn_conv(channels: int, filters: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Batch normalisation, ReLU, convolution: the order of pre-activation networks."""
    convolution = nn.Conv2d(channels, filters, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), convolution)


def head(channels: int) -> nn.Sequential:
    """Mean over the positions and a linear classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def lenet300() -> nn.Module:
    """LeNet-300-100 (LeCun et al., 1998): three linear layers, 266,610 parameters."""
    hidden = nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU()
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(100, CLASSES))


def lenet5() -> nn.Module:
    """LeNet-5 as the pruning literature has it: 20 and 50 filters of 5 x 5, then 500 units; 431,080 parameters."""
    features = nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*features, nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, CLASSES))


class Residual(nn.Module):
    """Two convolutions and a shortcut, projected where the shape changes (He et al., 2016)."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(channels, filters, 3, stride), nn.ReLU(), conv_bn(filters, filters))
        same = channels == filters and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(channels, filters, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet20(width: int = 16) -> nn.Module:
    """ResNet-20: three stages of three residual blocks, first convolution of stride 2."""
    layers: list[nn.Module] = [conv_bn(1, width, 3, 2), nn.ReLU()]
    channels = width
    for stage in range(3):
        for block in range(3):
            filters = width * 2**stage
            layers.append(Residual(channels, filters, 2 if stage and not block else 1))
            channels = filters
    return nn.Sequential(*layers, head(channels))


def resnet18() -> nn.Module:
    """ResNet-18 (He et al., 2016) for one channel: a stem of stride 4, four stages of two residual blocks."""
    layers: list[nn.Module] = [conv_bn(1, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage in range(4):
        for block in range(2):
            filters = 64 * 2**stage
            layers.append(Residual(channels, filters, 2 if stage and not block else 1))
            channels = filters
    return nn.Sequential(*layers, head(channels))


class PaddedResidual(nn.Module):
    """Two convolutions and a shortcut without parameters: every other position, zeros in the new channels."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(channels, filters, 3, stride)
        self.conv2, self.bn2 = conv_bn(filters, filters)
        self.stride, self.new = stride, (filters - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new, self.new)))


class CifarResNet20(nn.Module):
    """ResNet-20 for 32 x 32 colour images (He et al., 2016, section 4.2, option A)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 16)
        for stage, (channels, filters) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            first = PaddedResidual(channels, filters, 1 if stage == 1 else 2)
            rest = (PaddedResidual(filters, filters, 1) for _ in range(2))
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class WideBlock(nn.Module):
    """Pre-activation residual block of a wide residual network (Zagoruyko & Komodakis, 2016)."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = bn_conv(channels, filters, 3, stride), bn_conv(filters, filters)
        same = channels == filters and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, filters, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.shortcut(x)


def wrn16(widen: int = 2) -> nn.Module:
    """WRN-16-2: three stages of two wide blocks, first convolution of stride 2."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, 2, 1, bias=False)]
    channels = 16
    for stage in range(3):
        for block in range(2):
            filters = 16 * widen * 2**stage
            layers.append(WideBlock(channels, filters, 2 if stage and not block else 1))
            channels = filters
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), head(channels))


class Dense(nn.Module):
    """A layer whose output is appended to its input (Huang et al., 2017)."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.body = bn_conv(channels, growth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet22(growth: int = 12) -> nn.Module:
    """DenseNet-22: three blocks of six layers, 1 x 1 transitions between, first convolution of stride 2."""
    channels = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, 2, 1, bias=False)]
    for block in range(3):
        if block:
            layers += [bn_conv(channels, channels, 1), nn.AvgPool2d(2, ceil_mode=True)]
        for _ in range(6):
            layers.append(Dense(channels, growth))
            channels += growth
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), head(channels))


def vgg(width: int = 16) -> nn.Module:
    """VGG-style: pairs of 3 x 3 convolutions with batch normalisation, widths doubling, and two linear layers."""
    layers: list[nn.Module] = []
    channels = 1
    for filters in (width, 2 * width, 4 * width, 8 * width):
        layers += [conv_bn(channels, filters), nn.ReLU(), conv_bn(filters, filters), nn.ReLU(), nn.MaxPool2d(2)]
        channels = filters
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 128), nn.ReLU(), nn.Linear(128, CLASSES))


class Attention(nn.Module):
    """Multi-head self-attention of (batch, tokens, width) by four plain linear layers, which can be decomposed."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        parts = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Transformer block with normalisation before attention and before the two-layer perceptron."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al., 2021) on square patches; the classifier reads the mean token."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (28 // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, 4 * width) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.blocks(tokens).mean(1))
