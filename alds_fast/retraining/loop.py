"""The plain training loop: learning rates of any epoch of a schedule, one epoch, the dense model as a teacher."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..errors import ArgumentError, TrainingError
from ..measurement import call_model, device_of, inference


@dataclass(frozen=True)
class Recipe:
    """How the dense model was trained, and how many of its last epochs a retraining repeats.

    Attributes:
        loader: yields the batches of one epoch, again in every epoch; (inputs, targets) unless ``train_step`` is given.
        optimizer: model to optimizer.
        epochs, epochs_retrain: of the original training and of one retraining.
        loss: (output, targets) to a scalar; this or ``train_step``.
        train_step: (model, batch) to the scalar loss, which is then differentiated.
        scheduler: optimizer to its learning-rate schedule, stepped once an epoch.
        distill: weight of the teacher's loss, in [0, 1].
        teach: (output, teacher's output) to a scalar.
    """

    loader: Iterable[Any]
    optimizer: Callable[[nn.Module], Optimizer]
    epochs: int
    epochs_retrain: int
    loss: Callable[[Any, Any], Tensor] | None = None
    train_step: Callable[[nn.Module, Any], Tensor] | None = None
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    distill: float = 0.0
    teach: Callable[[Any, Any], Tensor] | None = None


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in its tuples, lists and dicts on the device; other objects as they are."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        moved = [to_device(value, device) for value in batch]
        return tuple(moved) if isinstance(batch, tuple) else moved
    return batch


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """The model in training mode; every module's ``training`` flag is put back at the end."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.train()  # a method of the model's own may do more than set the flag
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over the batch.

    Its gradient with respect to the student's logits is T (softmax(student / T) - softmax(teacher / T)) / N, of the
    size of the plain cross-entropy's whatever T is: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural
    Network", 2015, section 2.

    Args:
        student, teacher: logits (N, C) of any floating type.
        temperature: T > 0.

    Raises ArgumentError for anything but two tensors (N, C) of one shape.

    >>> round(float(soft_target_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2 * math.log(3)]]))), 4)
    0.5232
    """
    logits = isinstance(student, Tensor) and isinstance(teacher, Tensor) and student.dim() == 2
    if not logits or student.shape != teacher.shape:
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in (student, teacher)]
        raise ArgumentError(
            f"distill= compares logits of shape (N, C), the models return {shapes[0]} and {shapes[1]}; give "
            f"distill_loss=, a function (output, teacher's output) -> scalar, for other outputs"
        )
    predicted, target = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(predicted, target, reduction="batchmean", log_target=True)


def learning_rates(optimizer: Optimizer) -> list[float]:
    """The learning rate of every parameter group."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def _optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    optimizer = recipe.optimizer(model)
    if not isinstance(optimizer, Optimizer):
        raise ArgumentError(f"optimizer= returned a {type(optimizer).__name__}: expected a torch.optim.Optimizer")
    parameters = {id(p) for p in model.parameters()}
    if any(id(p) not in parameters for group in optimizer.param_groups for p in group["params"]):
        raise ArgumentError(
            "optimizer= returned an optimizer of other parameters than those of the model that it was given; "
            "write it as lambda model: torch.optim.SGD(model.parameters(), ...)"
        )
    return optimizer


def rewound(recipe: Recipe, model: nn.Module, epoch: int) -> tuple[Optimizer, LRScheduler | None]:
    """A fresh optimizer of the model with the learning rates of ``epoch`` (from 0) of the original training.

    The schedule is stepped ``epoch`` times from its start, so that any schedule that depends on the number of steps
    only is rewound exactly. Raises ArgumentError where a factory returns something else.
    """
    optimizer = _optimizer(recipe, model)
    if recipe.scheduler is None:
        return optimizer, None
    scheduler = recipe.scheduler(optimizer)
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise ArgumentError(
            f"scheduler= returned a {type(scheduler).__name__}: expected a torch.optim.lr_scheduler whose learning "
            f"rates depend on the number of epochs only"
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ArgumentError("scheduler= returned the schedule of another optimizer than the one that it was given")
    with warnings.catch_warnings():  # nothing has been trained before these steps, which is meant
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(epoch):
            scheduler.step()
    return optimizer, scheduler


def _batch_loss(recipe: Recipe, model: nn.Module, batch: Any, teacher: nn.Module) -> Tensor:
    if recipe.train_step is not None:
        return recipe.train_step(model, batch)
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ArgumentError(
            f"loader= yielded a {type(batch).__name__}: expected (inputs, targets); give train_step= for others"
        )
    assert recipe.loss is not None
    inputs, targets = batch
    output = call_model(model, inputs)
    loss = recipe.loss(output, targets)
    if not recipe.distill or recipe.teach is None:
        return loss
    with inference(teacher):
        wanted = call_model(teacher, inputs)
    return (1 - recipe.distill) * loss + recipe.distill * recipe.teach(output, wanted)


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        kind = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ArgumentError(f"the loss is {kind}: expected a tensor with one element")
    if not loss.requires_grad:
        raise ArgumentError(
            "the loss has no gradient: do not detach it, and leave some parameter with requires_grad=True"
        )


def run_epoch(recipe: Recipe, model: nn.Module, optimizer: Optimizer, teacher: nn.Module) -> float:
    """One pass over the loader in the mode that the model is in; the mean of the batches' losses.

    Raises ArgumentError for a loader without batches or a loss that cannot be differentiated, TrainingError if the
    mean is not finite.
    """
    device = device_of(model)
    total, count = torch.zeros((), device=device), 0
    for batch in recipe.loader:
        optimizer.zero_grad()
        loss = _batch_loss(recipe, model, to_device(batch, device), teacher)
        _check_loss(loss)
        loss.backward()
        optimizer.step()
        total, count = total + loss.detach().reshape(()).to(total), count + 1
    if not count:
        raise ArgumentError(
            "loader= yielded no batch; give one that can be iterated again in every epoch, not a generator"
        )
    mean = float(total) / count
    if not math.isfinite(mean):
        raise TrainingError(
            f"the mean loss is {mean} at learning rates {learning_rates(optimizer)}; lower them, or clip gradients in "
            f"a training function of your own (train=)"
        )
    return mean
