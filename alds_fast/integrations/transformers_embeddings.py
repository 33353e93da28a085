"""Resizing the vocabulary of a transformers model whose output layer is a low-rank one."""

from __future__ import annotations

import functools
import sys
from typing import Any

from ..errors import ModelError
from ..import_hooks import when_imported
from ..layers import AbsentWeight, LowRankLayer, label

_MODELS = "transformers.modeling_utils"


def check_resizing(model: Any, tokens: int | None, multiple: int | None) -> None:
    """ModelError, before anything is changed, if the model's output layer would have to be resized and is low-rank.

    ``tokens`` and ``multiple`` are what ``resize_token_embeddings`` of transformers is given: the new number of tokens,
    None for the one there is, and what it is rounded up to a multiple of.
    """
    head = model.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), AbsentWeight) or (tokens is None and multiple is None):
        return
    wanted = model.get_input_embeddings().weight.shape[0] if tokens is None else tokens
    wanted = -(-wanted // multiple) * multiple if multiple else wanted
    if wanted != head.out_features:
        name = next(name for name, module in model.named_modules() if module is head)
        dense = "put its to_dense() in its place first, by set_output_embeddings"
        first = dense if isinstance(head, LowRankLayer) else f"in the compressed model, {dense}"
        raise ModelError(
            f"layer {label(name)} is low-rank and cannot be resized from {head.out_features} to {wanted} tokens; "
            f"{first}, or compress with exclude={[name]!r}"
        )


def _checking(original: Any) -> Any:
    @functools.wraps(original)
    def resize_token_embeddings(
        self: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        check_resizing(self, new_num_tokens, pad_to_multiple_of)
        return original(self, new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    return resize_token_embeddings


def _teach_transformers() -> None:
    """Have its models ask first. transformers itself notices when half of the model has been resized."""
    base: Any = sys.modules[_MODELS].PreTrainedModel
    base.resize_token_embeddings = _checking(base.resize_token_embeddings)


when_imported(_MODELS, _teach_transformers)
