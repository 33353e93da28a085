"""Output heads of language models, the layers that turn hidden states into scores of tokens, stay dense by default."""

from __future__ import annotations

import contextlib

from torch import nn

from ..selection import ModuleNames, Selection, patterns
from .discovery import DecomposableLayer, Layer, find_layers
from .opening import why_closed
from .registry import is_table

_REASON = 'output head of a language model; include="*" decomposes it with all others'
_TABLE = 'a table of which rows are looked up; include=["*", "Embedding*"] decomposes it with all others'
PADDING = 64  # by which vocabularies are padded at most,
PADDED_TO = 8  # to a multiple of this,
ENTRIES = 8  # and entries for every one that is added at least
_BY_SIZE = "has an output for every entry of an embedding, as an " + _REASON


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


def _head_by_size(model: nn.Module) -> nn.Module | None:
    """The linear layer that gives a score for every entry of an embedding, if there is one.

    That is the one as large as it with more outputs than inputs, or the model's last one, padded outputs allowed. One
    with as many outputs as inputs is none: tables have the width of what is around them.
    """
    if any(hasattr(module, "get_output_embeddings") for module in model.modules()):
        return None  # which says what it is
    tables = {(m.num_embeddings, m.embedding_dim) for m in model.modules() if isinstance(m, nn.Embedding)}
    sizes = [(m, (m.out_features, m.in_features)) for m in model.modules() if isinstance(m, nn.Linear)]
    heads = [m for m, size in sizes if size in tables and size[0] > size[1]]
    if len(heads) == 1 or not sizes:
        return heads[0] if heads else None
    last, (outputs, inputs) = sizes[-1]
    most = max((entries for entries, width in tables if width == inputs), default=outputs + 1)
    padding = outputs - most
    padded = 0 < padding < PADDING and outputs % PADDED_TO == 0 and ENTRIES * padding <= most
    return last if outputs != inputs and (padding == 0 or padded) else None


def chosen_layers(model: nn.Module, include: Selection = None, exclude: Selection = None) -> list[Layer]:
    """The layers as :func:`alds_fast.layers.find_layers` has them, output heads and tables left out unless ``include``
    is given.

    A pattern of ``include`` that means one asks for it; ``"*"`` asks for heads, not for tables.
    """
    layers, closed = find_layers(model, include, exclude), why_closed(model, exclude)
    layers = [layer.left_out(closed[id(layer.module)]) if id(layer.module) in closed else layer for layer in layers]
    named, places = [p for p in patterns(include, "include") or () if p != "*"], ModuleNames(model)
    tables = [layer for layer in layers if is_table(layer.module) and not places.match(named, layer.name)]
    reasons = {id(layer.module): _TABLE for layer in tables}
    if include is None:
        reasons |= {id(module): _REASON for module in output_heads(model)}
    head = _head_by_size(model) if include is None else None
    if head is not None:
        reasons[id(head)] = _BY_SIZE
    stays = [isinstance(layer, DecomposableLayer) and id(layer.module) in reasons for layer in layers]
    return [layer.left_out(reasons[id(layer.module)]) if s else layer for layer, s in zip(layers, stays, strict=True)]
