"""Output heads of language models, the layers that turn hidden states into scores of tokens, stay dense by default."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from torch import nn

from .discovery import DecomposableLayer, Layer, find_layers

_REASON = "output head of a language model; name it in include= to decompose it"


def output_heads(model: nn.Module) -> list[nn.Module]:
    """The modules that ``get_output_embeddings`` of the model, and of models inside it, gives, with all in them.

    That is the convention of transformers, whose models for classification give None. A method that fails names no
    head.
    """
    heads = []
    for module in model.modules():
        method = getattr(module, "get_output_embeddings", None)
        with contextlib.suppress(Exception):
            head = method() if callable(method) else None
            heads += list(head.modules()) if isinstance(head, nn.Module) else []
    return heads


def chosen_layers(
    model: nn.Module, include: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = None
) -> list[Layer]:
    """The layers as :func:`alds_fast.layers.find_layers` has them, output heads left out unless ``include`` is given.

    A pattern of ``include`` that matches a head, ``"*"`` too, asks for it.
    """
    layers = find_layers(model, include, exclude)
    heads = set() if include is not None else {id(module) for module in output_heads(model)}
    dense = [isinstance(layer, DecomposableLayer) and id(layer.module) in heads for layer in layers]
    return [layer.left_out(_REASON) if stays else layer for layer, stays in zip(layers, dense, strict=True)]
