"""What every method gets, and what it is judged on: SmolLM2-135M, windows for calibration, windows of other texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from alds_fast import AldsError

from ..language import brown, perplexity, read_text, smollm2, windows
from ..networks import NETWORKS
from .layers import inside, linears

LENGTH = 512  # tokens of a window
CALIBRATION, JUDGED = 64, 16  # windows


@dataclass(frozen=True)
class Setting:
    """A dense language model, what may be compressed of it, and its data.

    Attributes:
        model: returns logits.
        include: a pattern of the names of the layers that may be compressed.
        calibration: windows (1, length) of tokens.
        texts: by name, windows (count, length) that perplexities are measured on.
    """

    model: nn.Module
    include: str
    calibration: list[Tensor]
    texts: dict[str, Tensor]

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """Those that may be compressed, by name."""
        return linears(self.model, self.include)

    def share_of_all(self, share: float) -> float:
        """A share of the layers as one of all parameters, for ``plan(params=)``."""
        total = sum(p.numel() for p in self.model.parameters())
        return (total - (1 - share) * inside(self.model, self.include)) / total

    def judged(self, model: nn.Module) -> dict[str, float]:
        """Perplexities by text."""
        return {name: perplexity(model, tokens) for name, tokens in self.texts.items()}

    def digest(self) -> str:
        """Of the data: results of other data do not stand beside these."""
        tokens = torch.cat([t.flatten() for t in (*self.calibration, *self.texts.values())])
        return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


def spread(tokens: Tensor, count: int, what: str) -> Tensor:
    """``count`` windows at equal distances."""
    if len(tokens) < count:
        raise AldsError(
            f"{what} has {len(tokens)} windows of {tokens.shape[1]} tokens, {count} are needed; take a longer text"
        )
    return tokens[:: len(tokens) // count][:count]


def smollm2_setting(
    also: Sequence[Path], calibration: int = CALIBRATION, judged: int = JUDGED, length: int = LENGTH
) -> Setting:
    """SmolLM2-135M; calibration and the first text are documents of the Brown corpus, alternate ones, then ``also``.

    A file of ``also``, which may be gzipped, is called like its name up to the first dot.
    """
    seen, unseen = (windows(text, length) for text in brown())
    texts = {"Brown": unseen} | {f.name.partition(".")[0]: windows(read_text(f), length) for f in also}
    if len(texts) != 1 + len(also):
        raise AldsError(f"--also: two of {[f.name for f in also]} have one name, or that of Brown; rename one")
    chosen = {name: spread(tokens, judged, name) for name, tokens in texts.items()}
    return Setting(
        smollm2(0), NETWORKS["smollm2"].include or "*", list(spread(seen, calibration, "Brown").split(1)), chosen
    )
