"""The layers that are compressed, what ranks a share of them is, and models with factors in their places."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import alds_fast as alds
from alds_fast.layers import replace_layers

from .formulas import Factors


def linears(model: nn.Module, include: str) -> dict[str, nn.Linear]:
    """The linear layers whose names match, in the order of the model."""
    named = model.named_modules()
    return {name: m for name, m in named if isinstance(m, nn.Linear) and fnmatch.fnmatch(name, include)}


def rank_at(layer: nn.Linear, share: float) -> int:
    """The largest rank, 1 at least, whose factors have no more than that share of the weight's parameters."""
    m, n = layer.weight.shape
    return max(1, int(share * m * n / (m + n)))


def wide_weight(layer: nn.Linear) -> Tensor:
    """The weight in float64."""
    return layer.weight.detach().double()


def low_rank(model: nn.Module, factors: Mapping[str, Factors]) -> nn.Module:
    """A copy of the model whose named layers are low-rank ones of one slice and plain factors."""
    new = {}
    for name, (left, right) in factors.items():
        dense = model.get_submodule(name)
        sizes, bias = (dense.in_features, dense.out_features), dense.bias is not None
        layer = alds.LowRankLinear(*sizes, len(right), bias=bias, device=dense.weight.device, dtype=dense.weight.dtype)
        layer.update_factors(left[None, None], right[None, None])
        new[name] = layer.train(dense.training)
    return replace_layers(model, new)


def share_left(small: nn.Module, model: nn.Module, include: str) -> float:
    """Parameters of the compressed model's layers that match, over those of the dense model."""
    outside = sum(p.numel() for p in model.parameters()) - inside(model, include)
    return (sum(p.numel() for p in small.parameters()) - outside) / inside(model, include)


def inside(model: nn.Module, include: str) -> int:
    """Parameters of the layers that match."""
    return sum(p.numel() for layer in linears(model, include).values() for p in layer.parameters())


@contextmanager
def before_calls(model: nn.Module, names: Sequence[str], told: Any) -> Iterator[None]:
    """``told(name, x)`` is called with what each of the named layers is called with."""

    def hook(name: str) -> Any:
        return lambda module, args: told(name, args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def input_groups(model: nn.Module, names: Sequence[str], batch: Tensor) -> list[list[str]]:
    """The layers in the order in which they are called, those that read one tensor together."""
    groups: list[list[str]] = []
    last: list[Tensor] = []

    def told(name: str, x: Tensor) -> None:
        if last and last[-1] is x:
            groups[-1].append(name)
        else:
            groups.append([name])
        last[:] = [x]

    with before_calls(model, names, told):
        model(batch)
    return groups
