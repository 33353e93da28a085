"""What the networks are asked to do: digits with labels, tones with a known pitch, sentences to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from examples import crepe

from . import data

CALIBRATION, BATCH = 1024, 128
Images = Callable[[Tensor], Tensor]


class Batches:
    """(input, target) batches of tensors in memory, in a new order every time it is iterated over.

    The orders follow from ``seed``; the last batch is left out where it is smaller.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, size: int, seed: int) -> None:
        self.inputs, self.targets, self.size = inputs, targets, size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.inputs) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.inputs), generator=self.generator)
        for rows in order[: len(self) * self.size].view(-1, self.size):
            yield self.inputs[rows], self.targets[rows]


def drawn(inputs: Tensor, count: int, size: int, seed: int) -> list[Tensor]:
    """``count`` rows of a tensor, drawn without repetition, in batches."""
    rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:count]
    return list(inputs[rows].split(size))


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is that of their label."""
    predicted = torch.cat([model(batch).argmax(1) for batch in images.split(250)])
    return float((predicted == labels).float().mean())


@dataclass(frozen=True)
class DigitTask:
    """MNIST as one network wants it: ``transform`` of images in [0, 1], and every ``every``-th test image.

    The first half of the test images is easier than the second, so a part of them is taken across both.
    """

    transform: Images
    every: int = 1

    def quality(self, model: nn.Module) -> float:
        """Share of test images that are recognised."""
        digits = data.mnist()
        images = self.transform(digits.test_images[:: self.every])
        return accuracy(model, images, digits.test_labels[:: self.every])

    def calibration(self, seed: int) -> list[Tensor]:
        """Batches of training images, without their labels."""
        return [self.transform(batch) for batch in drawn(data.mnist().train_images, CALIBRATION, BATCH, seed)]

    def train_loader(self, seed: int) -> Batches:
        """All training images."""
        digits = data.mnist()
        return Batches(self.transform(digits.train_images), digits.train_labels, BATCH, seed)


def standard(images: Tensor) -> Tensor:
    """Mean and deviation of the training images."""
    return (images - 0.1307) / 0.3081


def as_usps(images: Tensor) -> Tensor:
    """The digit's box, 20 x 20, at 16 x 16, which is how USPS digits fill theirs."""
    box = F.interpolate(images[:, :, 4:24, 4:24], 16, mode="bilinear", antialias=True, align_corners=False)
    return (box - 0.2471) / 0.2994


def as_svhn(images: Tensor) -> Tensor:
    """The middle 24 x 24 at 32 x 32, dark grey on light grey, in three channels."""
    large = F.interpolate(images[:, :, 2:26, 2:26], 32, mode="bilinear", align_corners=False)
    mean, deviation = torch.tensor([0.4377, 0.4438, 0.4728]), torch.tensor([0.1980, 0.2010, 0.1970])
    return (0.7 - 0.4 * large - mean[:, None, None]) / deviation[:, None, None]


@dataclass(frozen=True)
class PitchTask:
    """Synthesised tones; their seeds are apart from each other and from the calibration's and the training's."""

    tones: int

    def quality(self, model: nn.Module) -> float:
        """Share of frames whose pitch is within 50 cents."""
        return crepe.accuracy(model, *crepe.tones(self.tones, seed=1_000_001))

    def calibration(self, seed: int) -> list[Tensor]:
        """Batches of frames."""
        return list(crepe.tones(512, seed=2_000_000 + seed)[0].split(64))

    def train_loader(self, seed: int) -> Batches:
        """Frames and how near each of the 360 pitches is: a bell of 25 cents, as CREPE was trained (Kim, 2018)."""
        frames, cents = crepe.tones(4096, seed=3_000_000 + seed)
        bins = crepe.FIRST_BIN_CENTS + crepe.CENTS_PER_BIN * torch.arange(crepe.BINS)
        return Batches(frames, torch.exp(-((bins - cents[:, None]) ** 2) / (2 * 25.0**2)), 64, seed)


@lru_cache(maxsize=1)
def corpora() -> tuple[list[str], list[str]]:
    """Texts for calibration and for evaluation: news sentences and film reviews, alternate documents of each.

    The 50 news texts of Lee, Pincombe and Welsh (2005) are all evaluated.
    """
    halves: tuple[list[str], list[str]] = [], data.texts("lee.cor")
    for number, document in enumerate(data.texts("lee_background.cor")):
        sentences = [part.strip() for part in document.split(". ")]
        halves[number % 2].extend(text for text in sentences if len(text) > 20)
    for number, line in enumerate(data.texts("pang_lee_polarity.cor")):
        halves[number % 2].append(line.split(maxsplit=1)[1])
    seen = set(halves[0])
    return halves[0], [text for text in dict.fromkeys(halves[1]) if text not in seen]


Tokens = dict[str, Tensor]


class SentenceTask:
    """Similarities of sentence embeddings, compared with those of the dense network.

    Quality is Spearman's rank correlation of the cosine similarities of all pairs of ``texts`` evaluation texts with
    the dense network's, zero where it is negative.
    """

    def __init__(self, folder: Callable[[], Path], dense: Callable[[], nn.Module], texts: int = 256) -> None:
        self.folder, self.dense, self.texts = folder, dense, texts

    def tokens(self, texts: list[str], size: int = 32) -> list[Tokens]:
        """Padded batches of texts, cut after 128 tokens."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder())
        parts = [texts[i : i + size] for i in range(0, len(texts), size)]
        return [
            dict(tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt")) for part in parts
        ]

    @lru_cache(maxsize=1)  # noqa: B019 - one task lives as long as the registry
    def _evaluation(self) -> tuple[list[Tokens], Tensor]:
        """Evaluation batches, in order of length, and the dense network's similarities."""
        texts = corpora()[1]
        rows = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[: self.texts]
        batches = self.tokens(sorted((texts[i] for i in rows), key=len))
        return batches, similarities(self.dense(), batches)

    def quality(self, model: nn.Module) -> float:
        """The rank correlation; 1 for the dense network itself."""
        batches, wanted = self._evaluation()
        return max(0.0, float(spearmanr(similarities(model, batches), wanted).statistic))

    def calibration(self, seed: int) -> list[Tokens]:
        """768 texts."""
        texts = corpora()[0]
        rows = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:768]
        return self.tokens(sorted((texts[i] for i in rows), key=len))


def pooled(output: Any, batch: Tokens) -> Tensor:
    """Unit embeddings, (texts, width): means over the tokens that are not padding."""
    mask = batch["attention_mask"][:, :, None]
    return F.normalize((output.last_hidden_state * mask).sum(1) / mask.sum(1), dim=1)


@torch.inference_mode()
def similarities(model: nn.Module, batches: list[Tokens]) -> Tensor:
    """Cosine similarities of all pairs of texts, (n (n - 1) / 2,): means over the tokens that are not padding."""
    unit = torch.cat([pooled(model(**batch), batch) for batch in batches])
    first, second = torch.triu_indices(len(unit), len(unit), 1)
    return (unit @ unit.T)[first, second]
