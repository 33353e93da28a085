"""ResNets with random weights, which benchmarks and tests share."""

import torch
from torch import nn


def resnet_shapes(blocks, bottleneck):
    """(filters, channels, kernel) of every weight layer of a ResNet, the classifier last."""
    layers, channels = [(64, 3, 7)], 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        out = 4 * width if bottleneck else width
        for block in range(count):
            if bottleneck:
                layers += [(width, channels, 1), (width, width, 3), (out, width, 1)]
            else:
                layers += [(width, channels, 3), (width, width, 3)]
            if block == 0 and channels != out:
                layers.append((out, channels, 1))
            channels = out
    return [*layers, (1000, channels, 1)]


def resnet_shaped(blocks, bottleneck, seed=0):
    """All weight layers of a ResNet with random weights, as a ModuleList."""
    torch.manual_seed(seed)
    *convs, (classes, channels, _) = resnet_shapes(blocks, bottleneck)
    layers = [nn.Conv2d(c, f, k, padding=k // 2, bias=False) for f, c, k in convs]
    return nn.ModuleList([*layers, nn.Linear(channels, classes)])


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided) and 1x1 convolution with batch normalisation, and a shortcut, projected where it must be."""

    def __init__(self, channels, width, stride):
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        project = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Identity() if channels == out and stride == 1 else project

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


def with_falling_spectrum(module):
    """Random weight whose singular values fall like 1 / i, with a norm that keeps activations at their scale."""
    matrix = module.weight.data.flatten(1)
    rank = min(matrix.shape)
    left, right = torch.randn(matrix.shape[0], rank), torch.randn(rank, matrix.shape[1])
    product = (left / torch.arange(1, rank + 1)) @ right
    module.weight.data = (product * (2 * matrix.shape[0]) ** 0.5 / product.norm()).view_as(module.weight)


def resnet50(seed=0, blocks=(3, 4, 6, 3)):
    """ResNet-50 as it is built (He et al. 2015), with random weights of decaying spectra."""
    torch.manual_seed(seed)
    layers, channels = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()], 64
    layers.append(nn.MaxPool2d(3, 2, 1))
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(Bottleneck(channels, 64 * 2**stage, 2 if block == 0 and stage else 1))
            channels = 256 * 2**stage
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            with_falling_spectrum(module)
    return model.eval()


SHAPED = {
    "resnet18": lambda: resnet_shaped([2, 2, 2, 2], bottleneck=False),
    "resnet50": lambda: resnet_shaped([3, 4, 6, 3], bottleneck=True),
}
