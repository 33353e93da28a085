"""Texts for checkpoint directories: batches to calibrate on, and how well models foretell what is kept aside."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checks import is_count
from ..errors import ArgumentError, DependencyError, FileFormatError, MissingFileError
from ..integrations import transformers_name
from ..measurement import check_data
from .targets import Target

BATCH_TOKENS = 1024  # of a batch, unless one window is longer
ASIDE = 1 / 8  # of the windows, kept aside to say what is lost
_FORMS = "a text file, .jsonl with a text in every line, .safetensors with input_ids, or file.py:function"


def is_function(name: str) -> bool:
    """Whether ``--data`` names a function, file.py:function."""
    return ":" in name and not Path(name).is_file()


def read_windows(name: str, folder: str, length: int, vocabulary: int | None = None) -> Tensor:
    """Windows of so many tokens (windows, length) of a file, texts tokenized by the tokenizer of a directory.

    Raises MissingFileError, FileFormatError or ArgumentError for what cannot be read, and tokens that are not within
    the ``vocabulary``.
    """
    if not is_count(length) or length < 2:
        raise ArgumentError(f"--sequence {length!r} is not a number of tokens of at least 2")
    path = Path(name)
    if not path.is_file():
        raise MissingFileError(f"{name!r} is no file; name {_FORMS}")
    tokens = _stored_tokens(path) if path.suffix.lower() == ".safetensors" else _tokenized(_text(path), folder)
    rows = tokens.reshape(-1)[: tokens.numel() // length * length].view(-1, length)
    if len(rows) < 2:
        had = f"{name!r} has {tokens.numel()} tokens, fewer than two windows of --sequence {length}"
        raise ArgumentError(f"{had}; name a longer text, or a shorter --sequence")
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise ArgumentError(
            f"{name!r} has tokens from {low} to {high}, the model knows those from 0 to "
            f"{'its last' if vocabulary is None else vocabulary - 1}; is it of another tokenizer?"
        )
    return rows


def _stored_tokens(path: Path) -> Tensor:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as e:
        raise FileFormatError(f"{str(path)!r} is not a whole safetensors file ({e})") from e
    tokens = tensors.get("input_ids")
    if "attention_mask" in tensors:
        raise ArgumentError(
            f"{str(path)!r} holds an attention_mask, and windows are cut across its rows: leave padding out, or pass "
            f"file.py:function, which returns batches"
        )
    if tokens is None or tokens.dtype in (torch.bool, torch.complex64) or tokens.is_floating_point():
        raise FileFormatError(f"{str(path)!r} holds {', '.join(tensors) or 'nothing'}, no integers called input_ids")
    return tokens.long()


def _text(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() != ".jsonl":
            return content
        return "\n\n".join(json.loads(line)["text"] for line in content.split("\n") if line.strip())
    except UnicodeDecodeError as e:
        raise FileFormatError(f"{str(path)!r} is not a text in UTF-8; --data takes {_FORMS}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise FileFormatError(f'{str(path)!r} is not JSON with a "text" in every line ({e})') from e


def _tokenized(text: str, folder: str) -> Tensor:
    try:
        tokenizer = transformers_name("AutoTokenizer").from_pretrained(folder, local_files_only=True)
    except DependencyError:
        raise
    except Exception as e:
        raise ArgumentError(
            f"{folder!r} has no tokenizer that transformers can load ({type(e).__name__}); pass input_ids in a "
            f".safetensors file, or file.py:function"
        ) from e
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long, device="cpu")


def batches_of(windows: Tensor, tokens: int) -> list[dict[str, Tensor]]:
    """The first windows, of so many tokens together, in batches."""
    count = max(1, tokens // windows.shape[1])
    return [{"input_ids": part} for part in windows[:count].split(max(1, BATCH_TOKENS // windows.shape[1]))]


def calibration(
    name: str, folder: str, length: int, vocabulary: int | None, tokens: int
) -> tuple[list[Any], Tensor | None]:
    """Batches of ``--data``, and windows that are kept aside; none of a function's."""
    if is_function(name):
        batches = Target(name).batches()
        check_data(batches)
        return list(batches), None
    if not is_count(tokens):
        raise ArgumentError(f"--tokens {tokens!r} is not a positive number")
    windows = read_windows(name, folder, length, vocabulary)
    aside = max(1, int(len(windows) * ASIDE))
    spread = torch.linspace(0, len(windows) - 1, aside, device="cpu").round().long()  # over the whole text
    used = torch.ones(len(windows), dtype=torch.bool, device="cpu")
    used[spread] = False
    return batches_of(windows[used], tokens), windows[spread][: max(1, int(tokens * ASIDE) // length)]


@torch.inference_mode()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp of the mean loss of all tokens of the windows but their first."""
    losses = 0.0
    for part in windows.split(max(1, BATCH_TOKENS // windows.shape[1])):
        logits = model(input_ids=part.to(next(model.parameters()).device), use_cache=False).logits.float().cpu()
        losses += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    mean = losses / windows[:, 1:].numel()
    return math.exp(mean) if mean < 700 else math.inf
