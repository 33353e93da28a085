"""Training from scratch, the same for the same seed, kept in the cache folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from . import data

WARM_UP = 0.1  # share of the steps


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: the optimizer by parameters, how long, and what is minimised."""

    optimizer: Callable[[nn.Module], Optimizer]
    epochs: int
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy

    def schedule(self, optimizer: Optimizer, steps: int, start: int = 0) -> LambdaLR:
        """Learning rate of each of ``steps`` batches: up in a line for a tenth of them, down by a cosine to zero.

        It begins with the rate of batch ``start``.
        """
        return LambdaLR(optimizer, partial(_rate, steps=steps, start=start))


def _rate(step: int, steps: int, start: int) -> float:
    step += start
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def sgd(model: nn.Module, lr: float) -> Optimizer:
    """Nesterov momentum .9, weight decay 5e-4."""
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def adam(model: nn.Module, lr: float, decay: float = 0.0) -> Optimizer:
    """Adam, with decoupled weight decay."""
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=decay)


def fit(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    recipe: Recipe,
    log: Callable[[dict[str, object]], None],
    start: int = 0,
) -> None:
    """Train in place on one thread; ``log`` gets epoch, learning rate, mean loss, accuracy and seconds.

    With ``start`` > 0 only the epochs after that many, with their learning rates and a fresh optimizer.
    """
    optimizer = recipe.optimizer(model)
    schedule = recipe.schedule(optimizer, recipe.epochs * len(loader), start * len(loader))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model.train()
    try:
        for epoch in range(start + 1, recipe.epochs + 1):
            log({"epoch": epoch, **_epoch(model, loader, recipe.loss, optimizer, schedule)})
    finally:
        torch.set_num_threads(threads)
        model.eval()


def _epoch(model, loader, loss, optimizer, schedule) -> dict[str, object]:
    begin, total, right, seen = time.perf_counter(), 0.0, 0, 0
    rate = optimizer.param_groups[0]["lr"]
    for inputs, targets in loader:
        optimizer.zero_grad()
        logits = model(inputs)
        value = loss(logits, targets)
        value.backward()
        optimizer.step()
        schedule.step()
        total, seen = total + value.item() * len(inputs), seen + len(inputs)
        labels = targets if targets.ndim == 1 else targets.argmax(1)  # classes, or how likely each is
        right += int((logits.argmax(1) == labels).sum())
    seconds = time.perf_counter() - begin
    return {"lr": rate, "loss": total / seen, "accuracy": right / seen, "seconds": round(seconds, 1)}


def weights_file(name: str, seed: int) -> Path:
    """Where the weights of a trained network are; its log lies beside, with the ending ``jsonl``."""
    return data.cache() / "trained" / f"{name}-{seed}.safetensors"


def trained(
    name: str, seed: int, architecture: Callable[[], nn.Module], loader: Callable[[int], object], recipe: Recipe,
    test: Callable[[nn.Module], float], say: Callable[[str], None] = print,
) -> nn.Module:  # fmt: skip
    """The network from the cache, or trained now and put there when it is done."""
    model = initial(architecture, seed)
    file = weights_file(name, seed)
    if file.exists():
        model.load_state_dict(load_file(file))
        return model
    file.parent.mkdir(exist_ok=True)
    lines: list[dict[str, object]] = []

    def log(line: dict[str, object]) -> None:
        lines.append(line)
        say(f"{name} seed {seed}: {json.dumps(line)}")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fit(model, loader(seed), recipe, log)
    log({"test": test(model)})
    file.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scratch = file.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, scratch)
    scratch.rename(file)
    return model


def initial(architecture: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The architecture with the random weights of a seed, in eval mode; the caller's random state is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return architecture().eval()
