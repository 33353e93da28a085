"""Training of low-rank layers to what the dense model gives: steps, batches kept aside, the best state.

What is compared is asked for batch by batch; the parts of a batch are a distance that has a gradient, and what it is
divided by. A part of the batches is kept aside, and the parameters are as they were after the pass that did best there,
or as they were before where none did better.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_model, is_count, is_number
from ..errors import ArgumentError, ModelError
from ..layers import Int8LowRankLinear, LowRankLayer, is_narrowed, label, opened_for, oriented_weight
from ..measurement import Masks, check_batches
from .choice import FactorReport

SHARE_ASIDE = 1 / 8  # of the batches
LEAST_SIZE = 1e-3  # that steps are taken by: biases may be 0
Numbered = list[tuple[int, Any]]
Losses = Callable[[int, Any], list[tuple[Tensor, float]]]  # (number, batch) -> of each tensor distance and divisor


def check_schedule(data: Any, name: str, epochs: object, lr: object = 1.0) -> None:
    """ArgumentError for data that are no batches, or too few as far as they tell, and for wrong numbers."""
    check_batches(data, name)
    if not is_count(epochs):
        raise ArgumentError(f"epochs={epochs!r} is not an integer >= 1")
    if not is_number(lr) or not 0 < lr < math.inf:
        raise ArgumentError(f"lr={lr!r} is outside (0, inf); 1e-4 to 1e-2 is usual")
    if hasattr(data, "__len__"):
        _check_count(len(data), name)


def _check_count(count: int, name: str) -> None:
    if count < 2:
        raise ArgumentError(f"{name} has {count} batches; give two at least, of which one is kept aside")


def is_changed(module: nn.Module) -> bool:
    """Whether it is a low-rank layer, or a dense one without some hidden units: what is trained."""
    return isinstance(module, LowRankLayer) or is_narrowed(module)


def check_pair(small: nn.Module, model: nn.Module, caller: str) -> None:
    """ModelError unless the first is a compressed model in a wide type, and the second the dense one of it."""
    for net in (small, model):
        check_model(net)
    low: dict[str, Any] = {name: m for name, m in small.named_modules() if is_changed(m)}
    if not low:
        raise ModelError(f"the model has no low-rank layers: there is nothing that {caller} could train")
    if int8 := [name for name, m in low.items() if isinstance(m, Int8LowRankLinear)]:
        raise ModelError(f"layer {label(int8[0])} has int8 factors: {caller} first, then alds_fast.quantize_factors")
    check_wide(
        {name: layer.encoder if isinstance(layer, LowRankLayer) else layer.weight for name, layer in low.items()},
        caller,
    )
    dense = dict(opened_for(model, list(low)).named_modules(remove_duplicate=False))
    missing = [name for name in low if not isinstance(dense.get(name), nn.Module)]
    if missing or any(isinstance(m, LowRankLayer) for m in model.modules()):
        raise ModelError(f"{caller}(small, model, data): the second model is not the dense one that the first is of")


def check_wide(weights: Mapping[str, Tensor], caller: str) -> None:
    """ArgumentError for half types, which lose small steps."""
    half = next((name for name, weight in weights.items() if weight.dtype.itemsize < 4), None)
    if half is not None:
        raise ArgumentError(
            f"layer {label(half)} is {weights[half].dtype}, in which small steps get lost: {caller} takes models in "
            f"float32 (both of them .float()); make the result half afterwards"
        )


def set_aside(data: Any, name: str) -> tuple[Numbered, Numbered]:
    """The batches with their numbers from 1: those to train on, and those kept aside."""
    numbered: Numbered = list(enumerate(data, 1))
    _check_count(len(numbered), name)
    count = max(1, int(len(numbered) * SHARE_ASIDE))
    return numbered[:-count], numbered[-count:]


def trained_parameters(model: nn.Module, block: str = "") -> list[nn.Parameter]:
    """Those of a block's changed layers, and its biases and scales of norms, unless they are used elsewhere too.

    Without a block, those of the whole model.
    """
    module, inside = model.get_submodule(block), f"{block}." if block else ""
    low = [p for m in module.modules() if is_changed(m) for p in m.parameters()]
    named = model.named_parameters(remove_duplicate=False)
    shared = {id(p) for name, p in named if not name.startswith(inside)}
    every = dict.fromkeys([*low, *(p for p in module.parameters() if p.dim() == 1)])
    return [p for p in every if id(p) not in shared]


@contextmanager
def asking(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """These parameters and no others ask for a gradient; the flags are put back at the end."""
    chosen, before = set(map(id, parameters)), [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in chosen)
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


def mean_loss(losses: Losses, batches: Numbered) -> float:
    """The mean over the tensors of what all batches together give."""
    with torch.no_grad():
        parts = [[(float(part), by) for part, by in losses(*batch)] for batch in batches]
    sums = [[sum(column) for column in zip(*tensor, strict=True)] for tensor in zip(*parts, strict=True)]
    return sum(lost / by for lost, by in sums if by > 0) / len(sums)


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) / math.sqrt(max(1, x.numel()))


def train(
    losses: Losses, parameters: Sequence[nn.Parameter], used: Numbered, aside: Numbered, epochs: int, lr: float,
    after_pass: Callable[[int], None] = lambda done: None,
) -> tuple[float, float]:  # fmt: skip
    """Passes of AdamW over the batches, in a new order each, the rate along a cosine; the best state is kept.

    ``lr`` is a share of each parameter's root mean square, as in Shazeer and Stern, "Adafactor" (ICML 2018), so that it
    suits models with weights of any size.

    Returns the mean losses on the batches kept aside, before and after.
    """
    before = best = mean_loss(losses, aside)
    kept = [p.detach().clone() for p in parameters]
    groups = [{"params": [p], "lr": lr * max(LEAST_SIZE, rms(v))} for p, v in zip(parameters, kept, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(used))
    generator = torch.Generator().manual_seed(0)
    for epoch in range(1, epochs + 1):
        for i in torch.randperm(len(used), generator=generator, device="cpu").tolist():
            with torch.enable_grad():
                sum(lost / max(by, 1e-30) for lost, by in losses(*used[i])).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        loss = mean_loss(losses, aside)
        if loss < best:  # not where it is NaN
            best, kept = loss, [p.detach().clone() for p in parameters]
        after_pass(epoch)
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return before, best


def kept_places(masks: Masks, layer: str, output: Tensor, called: str) -> Any:
    """Which places of an output count: all without a mask, or, with a warning, where none fits."""
    if not masks:
        return ...
    own, other = masks.of(layer)
    for mask in (*own, *other):
        mask = mask.T if masks.tokens_first else mask
        if mask.shape == output.shape[:2]:
            return mask.to(output.device).bool()
    warnings.warn(
        f"the masks of data fit none of the outputs {tuple(output.shape)} of {called}: padding counts too; leave it "
        f"out of the batches, or say so by mask=None",
        stacklevel=6,
    )
    return ...


def trained_reports(
    reports: Mapping[str, FactorReport], small: nn.Module, model: nn.Module, method: str, blocks: Sequence[str] = ("",)
) -> dict[str, FactorReport]:
    """The reports of the low-rank layers within these blocks, after training by that method."""
    model = opened_for(model, list(reports))
    dense, low = (dict(net.named_modules(remove_duplicate=False)) for net in (model, small))
    inside = [name for name in reports if any(not block or name.startswith(f"{block}.") for block in blocks)]
    new = {}
    for name in inside:
        weight, cut = (oriented_weight(net[name]).detach().double() for net in (dense, low))
        norm, error = float(weight.norm()), math.nan  # of a layer without some hidden units
        if cut.shape == weight.shape:
            error = float((cut.to(weight) - weight).norm()) / norm if norm > 0 else 0.0
        new[name] = replace(reports[name], method=method, error=error, data_error=math.nan)
    return new
