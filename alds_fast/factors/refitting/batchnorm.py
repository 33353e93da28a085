"""Running statistics of BatchNorms follow what compression changes.

Both networks see the same batches, each BatchNorm normalising by its batch. With means m, m' and variances v, v' of
what it sees in the dense and in the compressed network, the running mean moves by m' - m and the running variance is
multiplied by v' / v: nothing changes where nothing was compressed, however few the batches are. Batches that give a
BatchNorm one value per channel, which has no variance, do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ModelError
from ...measurement import first_input, naming_batch, numbered_batches, private_runs

BATCHNORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
Seen = dict[str, list[tuple[Tensor, Tensor]]]  # by name: mean and variance, call by call


def _statistics(model: nn.Module, data: Iterable[Any], names: Sequence[str]) -> Seen:
    """What BatchNorms see when each normalises by its batch; the model and its buffers are left as they were."""
    seen: Seen = {name: [] for name in names}

    def hook(name: str) -> Callable[..., Tensor | None]:
        def normalise(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            x: Tensor = first_input(args, kwargs)
            if x.numel() <= x.shape[1]:
                return None
            var, mean = torch.var_mean(x.double(), [d for d in range(x.dim()) if d != 1])
            seen[name].append((mean, var))
            return F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)

        return normalise

    with ExitStack() as stack:
        run = stack.enter_context(private_runs(model))
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True).remove)
        for number, batch in numbered_batches(data):
            with naming_batch(number, "refit="):
                run(batch, number, f"batch {number} of refit=")
    return seen


def _means(name: str, moments: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Mean of the means and of the variances; ModelError unless finite."""
    means = [torch.stack(parts).mean(0) for parts in zip(*moments, strict=True)]
    if not all(bool(mean.isfinite().all()) for mean in means):
        raise ModelError(f"BatchNorm {name!r} sees NaN or infinite values on the batches of refit=; mend the data")
    return means


@torch.no_grad()
def move_statistics(model: nn.Module, small: nn.Module, data: Iterable[Any]) -> None:
    """Running means of the small network's BatchNorms move by, variances in the ratio of, what batches move.

    Raises ModelError if a network raised an exception or a BatchNorm sees NaN.
    """
    both = dict(model.named_modules())
    names = [
        name for name, norm in small.named_modules()
        if type(norm) in BATCHNORMS and norm.running_mean is not None and type(both.get(name)) is type(norm)
    ]  # fmt: skip
    if not names:
        return
    before, after = (_statistics(net, data, names) for net in (model, small))
    for name in names:
        if not before[name] or not after[name]:
            continue
        norm: Any = small.get_submodule(name)
        (mean, var), (new_mean, new_var) = _means(name, before[name]), _means(name, after[name])
        norm.running_mean = norm.running_mean + (new_mean - mean).to(norm.running_mean)
        norm.running_var = norm.running_var * torch.where(var > 0, new_var / var, 1.0).to(norm.running_var)
