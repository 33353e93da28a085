"""What the peers ask of calibration data: moments and sizes of inputs, and the Fisher information of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import before_calls, input_groups


@dataclass(frozen=True)
class Inputs:
    """By layer, float64: ``second`` is E[x x^T], (n, n), ``size`` is E|x_j|, (n,). Layers with one input share them."""

    second: dict[str, Tensor]
    size: dict[str, Tensor]


@torch.no_grad()
def input_moments(model: nn.Module, batches: Sequence[Tensor], names: Sequence[str]) -> Inputs:
    """Of the named layers, over all tokens of the batches; products in the model's type, summed up in float64."""
    groups = input_groups(model, names, batches[0])
    second: dict[str, Tensor] = {}
    size: dict[str, Tensor] = {}
    rows = 0

    def told(name: str, x: Tensor) -> None:
        flat = x.flatten(0, -2)
        second[name] = second.get(name, 0) + (flat.T @ flat).double()
        size[name] = size.get(name, 0) + flat.abs().sum(0, dtype=torch.float64)

    with before_calls(model, [group[0] for group in groups], told):
        for batch in batches:
            rows += batch.numel()
            model(batch)
    for group in groups:
        second[group[0]] /= rows
        size[group[0]] /= rows
        second |= dict.fromkeys(group, second[group[0]])
        size |= dict.fromkeys(group, size[group[0]])
    return Inputs(second, size)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of every token but the first."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def fisher_rows(model: nn.Module, batches: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """By layer sum_j E[(dLoss/dW_ij)^2], (m,), float64: the empirical Fisher information, one gradient a batch."""
    weights = {name: model.get_submodule(name).weight for name in names}
    sums = {name: torch.zeros(len(w), dtype=torch.float64, device=w.device) for name, w in weights.items()}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        for w in weights.values():
            w.requires_grad_(True)
        for batch in batches:
            loss = next_token_loss(model(batch).logits, batch)
            gradients = torch.autograd.grad(loss, list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                sums[name] += gradient.square().sum(1, dtype=torch.float64) / len(batches)
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    return sums
