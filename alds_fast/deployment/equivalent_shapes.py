"""Low-rank layers that compute the same function in another shape, for hardware that runs that shape faster."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..layers import Int8LowRankLinear, LowRankLayer, low_rank_like
from ..linalg import Decomposition, max_rank

MERGED_GROUPS = (1, 2, 4)  # slice counts that are tried in the place of a larger one


def _merged_encoder(encoder: Tensor, outer: int, groups: int, per_group: int, rank: int) -> Tensor:
    """Every ``per_group`` slices as one with a block-diagonal encoder, its ranks padded with zeros."""
    blocks = encoder.unflatten(0, (outer, groups, per_group, -1))
    old_rank, channels = blocks.shape[3:5]
    new = encoder.new_zeros(outer, groups, rank, per_group * channels, *encoder.shape[2:])
    for i in range(per_group):
        new[:, :, i * old_rank : (i + 1) * old_rank, i * channels : (i + 1) * channels] = blocks[:, :, i]
    return new.flatten(0, 2)


def regroup(layer: LowRankLayer, groups: int, rank: int) -> LowRankLayer:
    """The same function with fewer channel slices or a larger rank, without pivots: zeros and ones fill what is new.

    Args:
        layer: a low-rank layer; it is not changed, and the result shares nothing with it.
        groups: a divisor of ``layer.slices``.
        rank: at least ``layer.rank * layer.slices / groups``.

    Raises:
        ArgumentError: groups or rank is out of range.

    >>> from alds_fast import LowRankLinear
    >>> regroup(LowRankLinear(64, 32, rank=3, groups=4), 2, 8)
    LowRankLinear(in_features=64, out_features=32, scheme=0, groups=2, rank=8)
    """
    shape = layer.weight_shape
    if groups < 1 or layer.slices % groups:
        raise ArgumentError(f"groups={groups} does not divide the layer's {layer.slices}")
    per_group = layer.slices // groups
    full = max_rank(shape, layer.scheme, groups)
    if not layer.rank * per_group <= rank <= full:
        raise ArgumentError(f"rank={rank} is outside {layer.rank * per_group}..{full} for groups={groups}")
    new = low_rank_like(layer.dense_module(), Decomposition(layer.scheme, groups, rank))
    plain_encoder, plain_decoder = (factor.detach() for factor in layer.plain_factors())
    encoder = _merged_encoder(plain_encoder, shape.conv_groups, groups, per_group, rank)
    old = plain_decoder.unflatten(1, (groups, -1))
    decoder = old.new_zeros(old.shape[0], groups, rank, *old.shape[3:])
    decoder[:, :, : old.shape[2]] = old
    new.encoder = nn.Parameter(_like(encoder, layer.encoder), layer.encoder.requires_grad)
    new.decoder = nn.Parameter(_like(decoder.flatten(1, 2), layer.decoder), layer.decoder.requires_grad)
    new.bias = copy.deepcopy(layer.bias)
    return new.train(layer.training)


def _like(factor: Tensor, old: Tensor) -> Tensor:
    """In the memory format of the old factor."""
    last = old.dim() == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last)
    return factor.contiguous(memory_format=torch.channels_last) if last else factor.contiguous()


def variants(layer: LowRankLayer, multiple: int) -> dict[str, LowRankLayer]:
    """Shapes worth timing beside the layer's own, by a text like "groups=1, rank=24".

    Ranks are rounded up to ``multiple``; several slices may become 1, 2 or 4; of a layer with pivots its own without
    these too. What would be as large as the dense weight is left out. Of a layer with int8 factors there is none.
    """
    shape, forms = layer.weight_shape, dict[str, LowRankLayer]()
    if isinstance(layer, Int8LowRankLinear):
        return forms
    counts = sorted({g for g in MERGED_GROUPS if layer.slices % g == 0} | {layer.slices})
    sizes = [(g, -(-layer.rank * layer.slices // g // multiple) * multiple) for g in counts]
    for groups, rank in [(layer.slices, layer.rank)] * bool(layer.pivots) + sizes:
        if rank > max_rank(shape, layer.scheme, groups):
            continue
        if (groups, rank) == (layer.slices, layer.rank) and not layer.pivots:
            continue
        new = regroup(layer, groups, rank)
        if new.encoder.numel() + new.decoder.numel() < shape.numel:
            forms[f"groups={groups}, rank={rank}"] = new
    return forms
