"""Checks of what users give to retrain; each raises an error that says the value, the allowed range and the remedy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..checks import check_model, is_count, is_number, is_share
from ..errors import ArgumentError, BudgetError, ModelError
from ..layers import LowRankLayer, count_params


def check_dense(model: nn.Module) -> None:
    """ModelError unless it is a model with parameters and without low-rank layers."""
    check_model(model)
    if not count_params(model):
        raise ModelError("the model has no parameters: there is nothing to compress or train")
    low = [name for name, module in model.named_modules() if isinstance(module, LowRankLayer)]
    if low:
        raise ModelError(f"{low[0]!r} is a low-rank layer; pass the trained dense model, which the shares refer to")


def cycle_shares(keep: float | Sequence[float], cycles: int) -> tuple[float, ...]:
    """The share of the dense model's parameters that each cycle keeps.

    A number goes down geometrically, keep^(i / cycles) after cycle i = 1..cycles; a sequence holds the shares itself.
    Raises BudgetError or ArgumentError.

    >>> cycle_shares(0.25, 2), cycle_shares([0.6, 0.3], 1)
    ((0.5, 0.25), (0.6, 0.3))
    """
    if not is_count(cycles):
        raise ArgumentError(f"cycles={cycles!r} is not an integer >= 1")
    if is_share(keep):
        return tuple(float(keep) ** (i / cycles) for i in range(1, cycles + 1))
    if not isinstance(keep, Sequence) or isinstance(keep, str) or not len(keep) or not all(map(is_share, keep)):
        raise BudgetError(
            f"keep={keep!r} is outside (0, 1]: it is the share of the dense model's parameters that is left in the "
            f"end, for example keep=0.3, or one share for each cycle"
        )
    if cycles != 1:
        raise ArgumentError(f"cycles={cycles!r} with keep={keep!r}, which has a share for each cycle; leave cycles out")
    if any(b > a for a, b in itertools.pairwise(keep)):
        raise BudgetError(f"keep={keep!r} goes up; give shares that go down, the last one for the end")
    return tuple(map(float, keep))


def check_epochs(epochs: object, epochs_retrain: object) -> None:
    """ArgumentError unless 1 <= epochs_retrain <= epochs."""
    if not is_count(epochs):
        raise ArgumentError(f"epochs={epochs!r} is not an integer >= 1: the epochs of the original training")
    if not is_count(epochs_retrain) or epochs_retrain > epochs:
        raise ArgumentError(
            f"epochs_retrain={epochs_retrain!r} is outside 1..{epochs}: a retraining repeats the last epochs of the "
            f"original training, all of them at most; repeat it with cycles= for more"
        )


def check_source(train: object, plain: Mapping[str, object]) -> None:
    """ArgumentError unless there is one way to train: ``train``, or loader and optimizer with a loss or a step."""
    given = [name for name, value in plain.items() if value is not None]
    if train is not None and given:
        raise ArgumentError(
            f"train= with {given[0]}=: give a training function alone, or loader=, loss= and optimizer="
        )
    if train is None and not given:
        raise ArgumentError("no way to train: give train=, or loader=, loss= and optimizer=")
    for name in ("loader", "optimizer"):
        if train is None and plain[name] is None:
            raise ArgumentError(f"{name}= is missing: give loader=, loss= (or train_step=) and optimizer=, or train=")
    if train is None and (plain["loss"] is None) == (plain["train_step"] is None):
        raise ArgumentError("give loss=, a function (output, targets), or train_step=, a function (model, batch)")
    for name, value in {"train": train, **plain}.items():
        if name == "loader" and value is not None and not hasattr(value, "__iter__"):
            raise ArgumentError(f"loader= is a {type(value).__name__}: expected something that yields batches")
        if name != "loader" and value is not None and not callable(value):
            raise ArgumentError(f"{name}= is a {type(value).__name__}: expected a function")


def check_distillation(distill: object, temperature: object, distill_loss: object, loss: object) -> None:
    """ArgumentError unless the weight is in [0, 1], the temperature > 0 and there is a loss(output, targets)."""
    if not is_number(distill) or not 0 <= distill <= 1:
        raise ArgumentError(f"distill={distill!r} is outside [0, 1]: it is the weight of the dense model's part")
    if not is_number(temperature) or not 0 < temperature < math.inf:
        raise ArgumentError(f"temperature={temperature!r} is outside (0, inf); 2 to 5 is usual")
    if distill_loss is not None and not callable(distill_loss):
        raise ArgumentError(f"distill_loss= is a {type(distill_loss).__name__}: expected a function")
    if distill_loss is not None and not distill:
        raise ArgumentError("distill_loss= without distill=, its weight in (0, 1]")
    if distill and loss is None:
        raise ArgumentError(
            f"distill={distill!r} needs loss=; in train= or train_step= add the teacher's part yourself"
        )


def check_compress(compress: object) -> None:
    """ArgumentError unless it is a function or options without a budget."""
    if not isinstance(compress, Mapping) and not callable(compress):
        raise ArgumentError(
            f"compress= is a {type(compress).__name__}: expected options of alds.compress or a function"
        )
    budgets: Any = {"params", "flops", "memory", "latency", "error", "quality"}
    taken = sorted(budgets & set(compress)) if isinstance(compress, Mapping) else []
    if taken:
        raise ArgumentError(
            f"compress= holds {taken[0]!r}; keep= is the budget, on parameters; for others give a function "
            f"(model, keep, cycle)"
        )
