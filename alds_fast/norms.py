"""Running statistics of BatchNorms follow what compression changes.

Both networks see the same batches, each BatchNorm normalising by its batch. With means m, m' and variances v, v' of
what it sees in the dense and in the compressed network, the running mean moves by m' - m and the running variance is
multiplied by v' / v: nothing changes where nothing was compressed, however few the batches are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .measure import call_model, inference, preserved

NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d


def _statistics(model: nn.Module, data: Iterable[Any], names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Means and variances of what BatchNorms see, when each normalises by its batch; the model is left as it was."""
    norms: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    kept = {name: norm.momentum for name, norm in norms.items()}
    with preserved(model), inference(model):
        try:
            for norm in norms.values():
                norm.momentum, norm.training = None, True
                norm.reset_running_stats()
            for batch in data:
                call_model(model, batch)
            return {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}
        finally:
            for name, norm in norms.items():
                norm.momentum = kept[name]


@torch.no_grad()
def move_statistics(model: nn.Module, small: nn.Module, data: Iterable[Any]) -> None:
    """Running means of the small network's BatchNorms move by, variances in the ratio of, what batches move."""
    both = dict(model.named_modules())
    names = [
        name for name, norm in small.named_modules()
        if type(norm) in NORMS and norm.running_mean is not None and type(both.get(name)) is type(norm)
    ]  # fmt: skip
    if not names:
        return
    before, after = (_statistics(net, data, names) for net in (model, small))
    for name in names:
        norm: Any = small.get_submodule(name)
        (mean, var), (new_mean, new_var) = before[name], after[name]
        norm.running_mean += (new_mean - mean).to(norm.running_mean)
        norm.running_var *= torch.where(var > 0, new_var / var, 1.0).to(norm.running_var)
