"""Compress and retrain, once or in cycles, with the learning rates rewound."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..checks import explaining
from ..planning import Plan
from .cycles import Compress, Log, Pipeline, Train
from .loop import Recipe, soft_target_loss
from .options import check_compress, check_dense, check_distillation, check_epochs, check_source, cycle_shares
from .state import Store, json_value, state_crc32


@dataclass(frozen=True)
class Retrained:
    """What :func:`retrain` made.

    Attributes:
        model: compressed and retrained, each module in the mode (``training``) of the one that it comes from.
        plans: of every cycle; None where a function compressed and its model carries no plan.
        history: a record of every epoch, see :func:`retrain`.
    """

    model: nn.Module = field(repr=False)
    plans: tuple[Plan | None, ...] = field(repr=False)
    history: tuple[dict[str, Any], ...]


_KEEP = "the budget is keep=, a share of the parameters, for example keep=0.5"
_OTHERS = f"{_KEEP}; for others give compress=, a function (model, keep, cycle)"


@explaining(params=_KEEP, **dict.fromkeys(("flops", "memory", "latency", "error", "quality"), _OTHERS))
def retrain(
    model: nn.Module,
    *,
    keep: float | Sequence[float],
    cycles: int = 1,
    epochs: int,
    epochs_retrain: int | None = None,
    loader: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    train_step: Callable[[nn.Module, Any], Tensor] | None = None,
    optimizer: Callable[[nn.Module], Optimizer] | None = None,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    train: Train | None = None,
    compress: Mapping[str, Any] | Compress | None = None,
    distill: float = 0.0,
    temperature: float = 2.0,
    distill_loss: Callable[[Any, Any], Tensor] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    log: Log | None = None,
) -> Retrained:
    """Compress a trained model and train it again, once or in cycles, with the learning rates rewound.

    A cycle compresses the model and then trains it for ``epochs_retrain`` epochs with the learning rates of the last
    ``epochs_retrain`` of the ``epochs`` epochs of the original training, the optimizer fresh: learning-rate rewinding
    (Renda, Frankle, Carbin, ICLR 2020), as in the ALDS paper (Liebenwein et al., NeurIPS 2021). Further cycles make
    the low-rank layers dense again, W = decoder @ encoder, and decompose anew.

    Args:
        model: trained, dense, on any device, where the training runs; it is not changed.
        keep: share of its parameters left in the end, in (0, 1], or one share for each cycle, not going up.
        cycles: 1 is one-shot; after cycle i of n the share keep^(i/n) is left.
        epochs: of the original training.
        epochs_retrain: of each retraining, 1..epochs; None for ``epochs``.
        loader: yields the batches of an epoch and can be iterated again; (inputs, targets) with inputs a tensor, a
            tuple or list of positional or a dict of keyword arguments, or anything with ``train_step``.
        loss: (output, targets) to a scalar tensor.
        train_step: instead of ``loss``, (model, batch) to a scalar tensor, which is differentiated here.
        optimizer: model to ``torch.optim.Optimizer``, with the learning rate at which the training began.
        scheduler: optimizer to the learning-rate schedule of the whole original training, stepped once an epoch; None
            for a constant rate.
        train: instead of these, (model, start_epoch, epochs, log) trains the model in place from epoch start_epoch up
            to epochs of its own schedule, and calls log with a dict of numbers where it wishes.
        compress: options of :func:`alds_fast.compress`, budgets aside, used once in every cycle and once more before
            several, to see that the last budget can be met; or a function (model, keep, cycle) that returns a smaller
            model, for any other method or budget. It may change the model that it gets, a copy whose
            low-rank layers are dense; keep is a share of the original model and cycle counts from 0.
        distill: a in [0, 1], (1 - a) * loss(output, targets) + a * distill_loss(output, output of the dense model in
            evaluation mode) is trained on.
        temperature: of the default ``distill_loss``, :func:`alds_fast.retraining.loop.soft_target_loss` (Hinton et al.
            2015), which is for logits (N, C).
        distill_loss: for other outputs, (output, dense model's output) to a scalar.
        checkpoint: directory, made if missing, whose state is replaced after every compression and epoch (with
            ``train``, every cycle). The same call then goes on from it, on the CPU with bit-equal results, if random
            numbers come from torch's, numpy's, Python's or the loader's generators; data and functions must be the
            same, which is not checked; all else is.
        log: is called with every record of the history after it is on disk.

    Returns:
        The model, the plans and the history: a dict for every epoch of cycle, keep, params (all of the compressed
        model), epoch, rewound_epoch (all from 0), learning_rates (of each parameter group), loss (mean over the
        batches) and seconds. Beside the checkpoint it lies in history.jsonl, one line a record.

    Raises:
        BudgetError, ArgumentError, ModelError, WeightError, LayerNotFoundError: an argument is out of range, or the
            checkpoint is of other arguments.
        TrainingError: a mean loss is not finite.
        FileFormatError, FileWriteError, MissingFileError: the checkpoint is corrupt or cannot be written.

    >>> import torch
    >>> from functools import partial
    >>> x = torch.randn(64, 16)
    >>> dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    >>> sgd = partial(torch.optim.SGD, lr=0.1)
    >>> result = retrain(dense, keep=0.5, epochs=3, loader=[(x, x)], loss=nn.functional.mse_loss,
    ...                  optimizer=lambda model: sgd(model.parameters()))
    >>> [record["rewound_epoch"] for record in result.history]
    [0, 1, 2]
    """
    check_dense(model)
    shares = cycle_shares(keep, cycles)
    retrained = epochs if epochs_retrain is None else epochs_retrain
    check_epochs(epochs, retrained)
    options = {} if compress is None else compress
    check_compress(options)
    parts = {"loader": loader, "optimizer": optimizer, "loss": loss, "train_step": train_step, "scheduler": scheduler}
    check_source(train, parts)
    check_distillation(distill, temperature, distill_loss, loss)
    recipe = None
    if loader is not None and optimizer is not None:
        teach = distill_loss or partial(soft_target_loss, temperature=temperature)
        recipe = Recipe(loader, optimizer, epochs, retrained, loss, train_step, scheduler, distill, teach)
    store = None
    if checkpoint is not None:
        arguments = {"model": state_crc32(model), "keep": list(shares), "epochs": json_value([epochs, retrained])}
        arguments |= {"compress": json_value(options), "distill": json_value([distill, temperature])}
        ways = [
            name for name, value in {**parts, "train": train, "distill_loss": distill_loss}.items() if value is not None
        ]
        store = Store(checkpoint, {**arguments, "given": ways})
    state = Pipeline(model, shares, options, recipe, train, epochs, retrained, store, log).run()
    return Retrained(state.model, tuple(state.plans), tuple(state.history))
