"""Which tokens of a batch are padding, by the masks that the model itself is given."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from .samples import sample_count

USUAL = "attention_mask"
_DECODER = "decoder_attention_mask"
_TORCH_FIRST, _TORCH_DECODER = ("src_key_padding_mask", "key_padding_mask"), "tgt_key_padding_mask"  # True is padding
DEPTH = 4  # of containers in one another
NEVER_SEEN = -1e4  # a score that this is added to
_CROSS = ("encoder_attn", "encdecattention", "crossattention", "cross_attn", "encoder_decoder_attention")
_READS_ENCODER = ("k", "v", "key", "value", "k_proj", "v_proj", "kv", "kv_proj")


class Masks(NamedTuple):
    """(samples, tokens), True at tokens, of what an encoder (or the only network) and of what a decoder is given.

    There are several where a batch holds several of one name, as one for each of two texts.
    """

    first: tuple[Tensor, ...] = ()
    decoder: tuple[Tensor, ...] = ()
    apart: bool = False  # the decoder has tokens of its own
    tokens_first: bool = False  # layers get (tokens, samples)

    def of(self, layer: str) -> tuple[tuple[Tensor, ...], ...]:
        """Those that may hold for a layer by its name, the likeliest first."""
        parts = layer.lower().split(".")
        crossing = any(part in _CROSS for part in parts) and parts[-1] in _READS_ENCODER
        decoding = any("decoder" in part for part in parts) and not crossing
        own, other = (self.decoder, self.first) if decoding else (self.first, self.decoder)
        return own, () if self.apart else other

    def __bool__(self) -> bool:
        return bool(self.first or self.decoder)


def _entries(value: Any) -> dict[str, Any]:
    """What a mapping, a named tuple or a dataclass holds, by name; what tuples and lists hold, by place."""
    if is_dataclass(value) and not isinstance(value, type):
        return dict(vars(value)) if hasattr(value, "__dict__") else {}
    if isinstance(value, Mapping):
        return {str(key): part for key, part in value.items()}
    if isinstance(value, tuple | list):
        return dict(zip(getattr(value, "_fields", map(str, range(len(value)))), value, strict=False))
    return {}


def _flatten(values: Mapping[str, Any], depth: int = DEPTH) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        yield name, value
        if depth:
            yield from _flatten(_entries(value), depth - 1)


Arguments = list[tuple[str, Any]]


def _by_name(model: nn.Module, batch: Any) -> Arguments:
    """What the model is given by name: keywords, positional arguments by its signature, and what these hold by name."""
    args = (batch,) if isinstance(batch, Tensor) else batch if isinstance(batch, tuple | list) else ()
    try:
        names = list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):  # a forward without a signature
        names = []
    places = [*names[: len(args)], *(str(i) for i in range(len(names), len(args)))]
    return list(_flatten(dict(zip(places, args, strict=True)) if args else _entries(batch)))


def masks_of(model: nn.Module, batch: Any, mask: str | None) -> Masks:
    """The masks of a batch, empty for ``mask`` None.

    "attention_mask" stands for all the usual names: "decoder_attention_mask" and, inverted as torch has them,
    "src_key_padding_mask", "key_padding_mask" and "tgt_key_padding_mask" too. Any other name is that of a mask that is
    1 at tokens or, with "pad" in it, at padding. A mask of one row is that of all samples. Of one that says which token
    sees which, (samples, ..., tokens, tokens), what no token sees is padding. Raises ArgumentError for one that is no
    mask; warns of tensors that look like one and are not named.
    """
    if mask is None:
        return Masks()
    given = _by_name(model, batch)
    tokens_first = False
    if mask == USUAL:
        first, decoder = _named(given, (USUAL, False)), _named(given, (_DECODER, False))
        if not first and not decoder:
            first = _named(given, *((name, True) for name in _TORCH_FIRST))
            decoder = _named(given, (_TORCH_DECODER, True))
            tokens_first = any(getattr(m, "batch_first", True) is False for m in model.modules())
    else:
        first, decoder = _named(given, (mask, "pad" in mask)), []
    if not first and not decoder:
        _warn_of_others(given)
    samples = sample_count(batch)
    apart = any(name.startswith("decoder_input") or name == "tgt" for name, _ in given)
    return Masks(_for_all(first, samples), _for_all(decoder, samples), apart, tokens_first)


def _for_all(masks: Iterable[Tensor], samples: int) -> tuple[Tensor, ...]:
    return tuple(mask.expand(samples, -1) if len(mask) == 1 else mask for mask in masks)


def _named(given: Arguments, *kinds: tuple[str, bool]) -> list[Tensor]:
    """All masks of the first of the names that there is one of."""
    for wanted, padding in kinds:
        masks = [_mask(name, value, padding) for name, value in given if name == wanted]
        if any(mask is not None for mask in masks):
            return [mask for mask in masks if mask is not None]
    return []


def _of_a_mask(value: Tensor, padding: bool) -> Tensor:
    """Where values are those of a mask: 0 and 1, or 0 and -inf of one that is added to scores."""
    added = padding and value.is_floating_point()
    return (value == 0) | ((value == -torch.inf) if added else (value == 1))


def _warn_of_others(given: Arguments) -> None:
    """Say so where a tensor (samples, tokens) looks like a mask of padding."""
    for name, value in given:
        if "mask" not in name or not isinstance(value, Tensor) or value.dim() != 2:
            continue
        square = value.shape[0] == value.shape[1] and "pad" not in name  # which token sees which
        if not square and bool(_of_a_mask(value, True).all() | _of_a_mask(value, False).all()):
            warnings.warn(
                f"{name} looks like a mask of padding and is not used: with mask={name!r} padded tokens do not count "
                f"(it is {'True at padding' if 'pad' in name else '1 at tokens'} then), with mask=None all do",
                stacklevel=4,
            )


def _seen(value: Tensor) -> Tensor | None:
    """Which tokens any other one sees, by a mask (samples, ..., tokens, tokens) of 0 and 1, or added to scores."""
    zero = value == 0
    if value.is_floating_point() and bool((zero | (value <= NEVER_SEEN)).all()):
        seen = zero
    elif bool((zero | (value == 1)).all()):
        seen = ~zero
    else:
        return None
    return seen.flatten(1, -2).any(1)


def _mask(name: str, value: Any, padding: bool) -> Tensor | None:
    """True at tokens, of a mask that is 1 there, or that is True (or -inf, added to scores) at ``padding``."""
    value = torch.as_tensor(value, device="cpu") if isinstance(value, list) else value
    if not isinstance(value, Tensor):
        return None
    if value.dim() in (3, 4) and not padding and (seen := _seen(value)) is not None:
        return seen
    if value.dim() != 2 or not bool(_of_a_mask(value, padding).all()):
        ones = "True at padding and False at tokens" if padding else "1 or True at tokens and 0 or False at padding"
        raise ArgumentError(
            f"{name}: expected (samples, tokens) of {ones}, got shape {tuple(value.shape)}, values from {value.min()} "
            f"to {value.max()}; where this is labels, pass [ids for ids, labels in loader]; with mask=None all tokens "
            f"count"
        )
    return value == 0 if padding else value.bool()
