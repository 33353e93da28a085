"""Channels between layers in the order in which a layer with output pivots makes them.

Such a layer puts its outputs in order at the end of every call. Where only layers and functions of single channels see
them, the next layers can take them in the order in which they are made: rows and columns of weights are put in another
order once, and the model computes the same. Of several layers whose channels meet (gate and up projections, residual
branches) the one of the largest rank sets the order.

What the example does not show is not seen: another branch of the code, an option that returns what is in between, a
method or user that reads the layers' values. So it is done only where it is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import LOW_RANK, LowRankLayer, has_hooks, label, replace_layers, tied_names
from ..measurement import check_runs, leaves_of
from .channel_flow import BATCH_NORMS, Group, channel_groups

ALIKE_POWER = 0.7  # power of a type's epsilon, up to which outputs may differ: 1e-5 in float32, .03 in bfloat16
_DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_plain(module: nn.Module, tied: Mapping[int, Any]) -> bool:
    """Whether its tensors are its own, and nothing hangs on it that could see its channels."""
    known = type(module) in (*_DENSE, *BATCH_NORMS, *LOW_RANK.values()) and "forward" not in vars(module)
    tensors = [t for table in (module._parameters, module._buffers) for t in table.values() if t is not None]
    return known and not has_hooks(module) and not any(id(t) in tied for t in tensors)


def _makes_any_order(module: nn.Module) -> bool:
    """Whether its outputs can stand in any order."""
    if isinstance(module, LowRankLayer):
        return module.weight_shape.conv_groups == 1
    return getattr(module, "groups", 1) == 1


def _takes_any_order(module: nn.Module) -> bool:
    """Whether its inputs can stand in any order: channels of several slices, which are runs of them, cannot."""
    if isinstance(module, LowRankLayer):
        return module.weight_shape.conv_groups == 1 and module.slices == 1
    return getattr(module, "groups", 1) == 1


def _leader(group: Group, modules: Mapping[str, nn.Module], tied: Mapping[int, Any]) -> str | None:
    """The layer whose order the group may take; None if there is none, or if something else cannot."""
    makers, takers = ({name: modules[name] for name in names} for names in (group.makers, group.takers))
    norms = [modules[name] for name in group.norms]
    if not all(_is_plain(m, tied) for m in (*makers.values(), *takers.values(), *norms)):
        return None
    if not all(map(_makes_any_order, makers.values())) or not all(map(_takes_any_order, takers.values())):
        return None
    low_rank = {name: m for name, m in makers.items() if isinstance(m, LowRankLayer)}
    pivoted = [name for name, m in low_rank.items() if m.pivots == "output"]
    if any(low_rank[name].in_order for name in pivoted):
        return None
    return max(pivoted, key=lambda name: low_rank[name].rank, default=None)


def _reordered(tensor: Tensor, dim: int, order: Tensor) -> Tensor:
    """Along a dimension, in the memory format that it had."""
    new = tensor.detach().index_select(dim, order.to(tensor.device))
    last = tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    return new.contiguous(memory_format=torch.channels_last) if last else new.contiguous()


def _set(module: nn.Module, name: str, dim: int, order: Tensor) -> None:
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(_reordered(old, dim, order), old.requires_grad))
    elif old is not None:
        setattr(module, name, _reordered(old, dim, order))


def _make_in(module: Any, order: Tensor) -> None:
    """Output i becomes what output ``order[i]`` was."""
    _set(module, "bias", 0, order)
    if not isinstance(module, LowRankLayer):
        _set(module, "weight", 0, order)
    elif module.pivots != "output":
        _set(module, "decoder", 0, order)
    else:
        _set(module, "order", 0, order)
        module.in_order = bool((module.order == torch.arange(len(order), device=module.order.device)).all())


def _take_in(module: Any, order: Tensor) -> None:
    """Input i is what input ``order[i]`` was."""
    if not isinstance(module, LowRankLayer):
        _set(module, "weight", 1, order)
    elif module.pivots == "input":
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        module.order = places.to(module.order.device)[module.order]
    else:
        _set(module, "encoder", 1, order)


def _in_the_order_of(leader: Any, group: Group, modules: Mapping[str, nn.Module]) -> None:
    made = torch.empty_like(leader.order)
    made.scatter_(0, leader.order, torch.arange(len(made), device=made.device))  # of every place, the output
    for name in group.makers:
        _make_in(modules[name], made)
    for name in group.norms:
        for part in ("weight", "bias", "running_mean", "running_var"):
            _set(modules[name], part, 0, made)
    for name in group.takers:
        _take_in(modules[name], made)


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    return [leaf for leaf in leaves_of(check_runs(model, example_inputs, "example_inputs")) if isinstance(leaf, Tensor)]


def _alike(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Up to what another order of sums may do; numbers that are whole are the same ones."""
    if not expected or len(expected) != len(found):
        return False
    for x, y in zip(expected, found, strict=True):
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        if not x.is_floating_point() and not x.is_complex():
            if not torch.equal(x, y):
                return False
            continue
        wide = [t.to(torch.complex128 if x.is_complex() else torch.float64).nan_to_num() for t in (x, y)]
        if not float((wide[1] - wide[0]).norm()) <= torch.finfo(x.dtype).eps ** ALIKE_POWER * float(wide[0].norm()):
            return False
    return True


@torch.no_grad()
def with_channels_in_order(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A copy of the model whose layers with output pivots make them in order, wherever what follows can take that.

    The model itself where nothing is to be gained, or, with a warning, where its outputs on the example, which are
    compared, are others.
    """
    pivoted = [n for n, m in model.named_modules() if isinstance(m, LowRankLayer) and m.pivots == "output"]
    if not pivoted:
        return model
    modules, tied = dict(model.named_modules()), tied_names(model)
    groups = channel_groups(model, example_inputs)
    leaders = [(name, group) for group in groups if (name := _leader(group, modules, tied)) is not None]
    if not leaders:
        return model
    result = replace_layers(model, {})
    copied = dict(result.named_modules())
    for name, group in leaders:
        _in_the_order_of(copied[name], group, copied)
    if _alike(_outputs(model, example_inputs), _outputs(result, example_inputs)):
        return result
    warnings.warn(
        f"the channels of layer {label(leaders[0][0])} and others are put in order at every call: without that the "
        f"model gave other outputs, so that something unseen depends on their order",
        stacklevel=3,
    )
    return model
