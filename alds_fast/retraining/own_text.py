"""Text that a language model writes itself, to train a compressed one on where other text is short."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ModelError
from ..measurement import inference
from ..progress import ProgressOption, telling


@torch.inference_mode(False)  # or what comes of it could not be trained on
def own_text(
    model: nn.Module,
    starts: Iterable[Any],
    *,
    count: int = 128,
    length: int = 512,
    prompt: int = 8,
    seed: int = 0,
    together: int = 64,
    progress: ProgressOption = None,
) -> list[dict[str, Tensor]]:
    """Sequences drawn from what a language model foretells, begun with a few tokens of a text.

    Calibration text is soon learned by heart: :func:`alds_fast.distill` goes on with what the dense model writes, on
    which its own probabilities are the truth. Source: Liu, Oguz, Zhao, et al., "LLM-QAT: Data-Free Quantization Aware
    Training for Large Language Models", Findings of ACL (2024).

    Args:
        model: the dense model, one of transformers with a ``generate`` and no encoder. It may be a copy in bfloat16.
        starts: batches that it is calibrated on, tensors (sequences, tokens) or dicts of ``input_ids``. Each sequence
            begins with ``prompt`` tokens of them, from a place drawn at random.
        count: how many sequences.
        length: tokens of each.
        prompt: of these the ones taken from ``starts``, one at least.
        seed: of all that is drawn; the random numbers of torch go on as if nothing had been drawn.
        together: sequences that are written at a time. Their keys and values are in memory.
        progress: as for :func:`alds_fast.analyze`.

    Returns:
        ``count`` batches of one sequence, {"input_ids": (1, length)}, int64, where the model is. No sequence ends
        before its length: the tokens that say so are not drawn. Temperature is 1, nothing is left out for being rare.

    Raises:
        ArgumentError: a number is out of range, or ``starts`` have no sequence of ``prompt`` tokens.
        ModelError: the model cannot write.
    """
    _check_model(model, length)
    for name, value, least in (("count", count, 1), ("prompt", prompt, 1), ("length", length, prompt + 1),
                               ("together", together, 1)):  # fmt: skip
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ArgumentError(f"{name}={value!r} is not an integer >= {least}")
    lines = [line for batch in starts for line in _tokens(batch) if len(line) >= prompt]
    if not lines:
        raise ArgumentError(
            f"starts have no sequence of prompt={prompt} tokens; pass longer ones, or a smaller prompt="
        )
    place = next(model.parameters()).device
    draw = torch.Generator(device="cpu").manual_seed(seed)
    written: list[Tensor] = []
    devices = [place] if place.type == "cuda" else []
    with inference(model), torch.random.fork_rng(devices), telling(progress) as tell:
        torch.manual_seed(seed)
        while len(written) < count:
            first = [_start(lines, prompt, draw) for _ in range(min(together, count - len(written)))]
            written += _continued(model, torch.stack(first).to(place), length)
            tell("sequences written", len(written), count)
    return [{"input_ids": sequence.unsqueeze(0)} for sequence in written]


def _check_model(model: Any, length: int) -> None:
    config = getattr(model, "config", None)
    if not callable(getattr(model, "generate", None)) or config is None:
        raise ModelError(f"{type(model).__name__} has no generate(): own_text() is for language models of transformers")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} has an encoder: own_text() is for models that go on with what they read"
        )
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and isinstance(length, int) and length > most:
        raise ArgumentError(f"length={length} is above the {most} positions that the model has")


def _tokens(batch: Any) -> Tensor:
    """(sequences, tokens) of a batch."""
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        raise ArgumentError(
            f"starts holds a {type(batch).__name__}: expected integer tensors (sequences, tokens), or dicts of them "
            f"called input_ids"
        )
    return tokens.cpu()


def _start(lines: list[Tensor], prompt: int, draw: torch.Generator) -> Tensor:
    """Some tokens that follow one another in one of the lines."""
    line = lines[int(torch.randint(len(lines), (), generator=draw, device="cpu"))]
    at = int(torch.randint(len(line) - prompt + 1, (), generator=draw, device="cpu"))
    return line[at : at + prompt].long()


def _continued(model: Any, first: Tensor, length: int) -> Tensor:
    """(sequences, length), of which ``first`` (sequences, prompt) are the beginnings."""
    more = length - first.shape[1]
    return model.generate(
        first, attention_mask=torch.ones_like(first), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        repetition_penalty=1.0, no_repeat_ngram_size=0, min_new_tokens=more, max_new_tokens=more, use_cache=True,
        pad_token_id=0,
    )  # fmt: skip
