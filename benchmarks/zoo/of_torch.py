"""Models made of torch's own layers."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from .case import Case, image, tokens


class Tagger(nn.Module):
    """A table, a recurrent network of two layers and directions, and a linear head."""

    def __init__(self, kind: type[nn.RNNBase], width: int = 256) -> None:
        super().__init__()
        self.table = nn.Embedding(500, width)
        self.body = kind(width, width, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(nn.Linear(2 * width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 50))

    def forward(self, words: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(self.table(words))[0])
        return y


class UNet(nn.Module):
    """Down by strided convolutions, up by transposed ones, and a shortcut at each size (Ronneberger et al. 2015)."""

    def __init__(self, width: int = 48, depth: int = 3) -> None:
        super().__init__()
        sizes = [width * 2**i for i in range(depth + 1)]
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in pairwise(sizes))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 4, 2, 1) for a, b in pairwise(sizes))
        self.join = nn.ModuleList(nn.Conv2d(2 * a, a, 3, padding=1) for a in sizes[:-1])
        self.last = nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = [torch.relu(self.first(x))]
        for down in self.down:
            seen.append(torch.relu(down(seen[-1])))
        y = seen.pop()
        for up, join in zip(reversed(self.up), reversed(self.join), strict=True):
            y = torch.relu(join(torch.cat([up(y), seen.pop()], 1)))
        out: Tensor = self.last(y)
        return out


def _sequences(width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 12, width, device="cpu"), torch.randn(2, 9, width, device="cpu")


def transformer(width: int = 256) -> nn.Module:
    """torch's encoder and decoder, two layers each."""
    return nn.Transformer(width, 4, 2, 2, 2 * width, batch_first=True)


CASES = [
    Case("torch/transformer", transformer, lambda: _sequences(256)),
    Case("torch/lstm-tagger", lambda: Tagger(nn.LSTM), lambda: tokens(20, 500)),
    Case("torch/gru-tagger", lambda: Tagger(nn.GRU), lambda: tokens(20, 500)),
    Case("torch/unet", UNet, lambda: image(64)),
]
