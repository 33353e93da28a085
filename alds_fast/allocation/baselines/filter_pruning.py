"""Filter thresholding, to compare low-rank decomposition with: whole filters of small norm are removed.

What goes together when a filter is removed (the inputs of the layers after it, batch normalisation, the other filters
that are added to its output) is found by torch-pruning's dependency graph: Fang, Ma, Song, Mi, Wang, "DepGraph:
towards any structural pruning", CVPR 2023. It is an optional dependency, ``pip install 'alds_fast[prune]'``.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from ...checks import is_share
from ...errors import AldsError, ArgumentError, BudgetError, ModelError
from ...layers import count_params, replace_layers, tied_names
from ...measurement import attribute_set, call_model, copy_batch, count_inputs, inference, keeping_state, layer_inputs
from ..costs import SHARES
from ..pareto import Floats, Ints

NORMS = {"l1": 1, "l2": 2}
SCOPES = ("global", "uniform")


def _torch_pruning() -> Any:
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as e:
        raise ArgumentError("filter_threshold needs torch-pruning: pip install 'alds_fast[prune]'") from e


@dataclass(frozen=True)
class Unit:
    """Filters that can be removed one by one, of one layer or of several whose outputs are added.

    ``name`` is that of the first layer. ``order`` holds all but one filter, those removed first at the front, and
    ``levels``, ascending, the threshold from which on each of them is removed.
    """

    name: str
    order: Ints
    levels: Floats

    def filters_to_remove(self, level: float) -> list[int]:
        """The filters removed at that threshold."""
        return [int(i) for i in self.order[: int(np.searchsorted(self.levels, level, side="right"))]]


def _unit(name: str, norms: Floats, scope: str) -> Unit:
    order = np.argsort(norms, kind="stable")[:-1]
    levels = norms[order] if scope == "global" else np.arange(1, len(norms)) / len(norms)
    return Unit(name, order.astype(np.int64), levels)


def _graph(model: nn.Module, example_inputs: Any) -> Any:
    """torch-pruning's graph of a model of our own, traced in evaluation mode by its gradients."""
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point() or p.is_complex())
    graph = _torch_pruning().DependencyGraph()
    try:
        with torch.enable_grad(), keeping_state(model), attribute_set(model.modules(), "training", False):
            graph.build_dependency(model, copy_batch(example_inputs), forward_fn=call_model, verbose=False)
    except Exception as e:
        raise ModelError(f"torch-pruning cannot trace the model ({type(e).__name__}: {e})") from e
    return graph


def _prunable(module: Any, tied: Iterable[int]) -> bool:
    """Whether a single channel of this layer or operation can go."""
    if not isinstance(module, nn.Module) or any(id(p) in tied for p in module.parameters(recurse=False)):
        return False
    if isinstance(module, _ConvNd):
        return module.groups in (1, module.out_channels)
    plain = isinstance(module, nn.Linear | _BatchNorm | nn.LayerNorm | nn.PReLU)
    return plain or type(module).__module__.startswith("torch_pruning.")  # an operation between layers


def _filters(module: nn.Module) -> Floats:
    """The weights of a layer, (filters, weights of a filter)."""
    weight: Any = module.weight
    by_filter = weight.transpose(0, 1) if getattr(module, "transposed", False) else weight
    return by_filter.detach().flatten(1).double().cpu().numpy()


def _units(model: nn.Module, example_inputs: Any, norm: str, scope: str) -> Iterator[Unit]:
    """Everything that can be pruned without changing the model's outputs in shape."""
    graph, tied = _graph(model, example_inputs), tied_names(model)
    names = {module: name for name, module in model.named_modules()}
    for group in graph.get_all_groups():
        items = [group[i] for i in range(len(group))]
        ends = any(graph.is_out_channel_pruning_fn(i.dep.handler) and not i.dep.target.outputs for i in items)
        if ends or not all(_prunable(i.dep.target.module, tied) for i in items):
            continue
        sums, counts = np.zeros(len(items[0].idxs)), np.zeros(len(items[0].idxs))
        for item in items:
            module = item.dep.target.module
            if isinstance(module, _ConvNd | nn.Linear) and graph.is_out_channel_pruning_fn(item.dep.handler):
                sums[item.root_idxs] += np.linalg.norm(_filters(module)[item.idxs], NORMS[norm], axis=1)
                counts[item.root_idxs] += 1
        yield _unit(names[items[0].dep.target.module], sums / counts, scope)


def _prune(model: nn.Module, example_inputs: Any, units: Sequence[Unit], level: float) -> nn.Module:
    """A copy without the filters removed at that threshold."""
    result = replace_layers(model, {})
    modules = dict(result.named_modules())
    graph = _graph(result, example_inputs)
    for unit in units:
        module, filters = modules[unit.name], unit.filters_to_remove(level)
        if filters:
            graph.get_pruning_group(module, graph.get_pruner_of_module(module).prune_out_channels, filters).prune()
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, p in result.named_parameters():
        p.requires_grad_(trained[name])
    return result


def _outputs(model: nn.Module, example_inputs: Any) -> list[Any]:
    """Shapes of the model's outputs."""
    with keeping_state(model), inference(model):
        return [getattr(leaf, "shape", None) for leaf in tree_leaves(call_model(model, copy_batch(example_inputs)))]


def _fits(model: nn.Module, example_inputs: Any, units: Sequence[Unit], level: float) -> bool:
    """Whether the pruned model runs and its outputs have the shapes of the original's."""
    try:
        return _outputs(_prune(model, example_inputs, units, level), example_inputs) == _outputs(model, example_inputs)
    except AldsError:
        raise
    except Exception:  # whatever a model raises where a width is written down in its code
        return False


def _usable(model: nn.Module, example_inputs: Any, units: Sequence[Unit]) -> list[Unit]:
    """The units that can be pruned: all, or those whose first filter can go, tried one by one."""
    if _fits(model, example_inputs, units, math.inf):
        return list(units)
    usable = [unit for unit in units if _fits(model, example_inputs, [unit], unit.levels[0])]
    if not _fits(model, example_inputs, usable, math.inf):
        raise ModelError("the pruned model does not run or returns other shapes: its filters cannot be removed")
    return usable


def _check(params: object, flops: object, norm: object, scope: object) -> tuple[str, float]:
    """The budget's name and share."""
    given = {name: share for name, share in (("params", params), ("flops", flops)) if share is not None}
    if len(given) != 1:
        raise BudgetError("give one budget, params= or flops=; for example params=0.5 keeps half of the parameters")
    ((name, share),) = given.items()
    if not is_share(share):
        raise BudgetError(f"{name}={share!r} is outside (0, 1]: it is the share of {SHARES[name]}, for example 0.5")
    for argument, value, known in (("norm", norm, tuple(NORMS)), ("scope", scope, SCOPES)):
        if value not in known:
            raise ArgumentError(f"{argument}={value!r} is not one of {', '.join(known)}")
    return name, float(share)


def filter_threshold(
    model: nn.Module,
    *,
    params: float | None = None,
    flops: float | None = None,
    example_inputs: Any,
    norm: str = "l2",
    scope: str = "global",
) -> nn.Module:
    """Magnitude filter thresholding: a copy of the model without the filters of small norm; ``model`` is not changed.

    A filter is all weights that make one output channel, ||W[i]||_1 or ||W[i]||_2; filters that can only go together
    (their outputs are added) have the mean of their norms. The threshold is the lowest that meets the budget, found by
    bisection over the models really pruned. H. Li, A. Kadav, I. Durdanovic, H. Samet, H. P. Graf, "Pruning filters for
    efficient ConvNets", ICLR 2017.

    What the model returns keeps its shape, and every layer keeps a filter. Left out are convolutions that have groups
    and are not depthwise, tied weights, modules of other kinds than Linear, convolution, batch and layer normalisation
    and PReLU, and layers whose width is written down in the model's code.

    Args:
        params, flops: one of them: the share, in (0, 1], of the model's parameters or of its operations (as
            ``torch.utils.flop_counter`` counts them) to keep at most.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments; on the
            model's device.
        norm: "l1" or "l2".
        scope: "global", one threshold for all filters of the model, or "uniform", the same share of every layer's.

    Raises:
        BudgetError: none or two budgets, out of range, or smaller than the smallest reachable.
        ArgumentError: torch-pruning is not installed, or another argument is out of range.
        ModelError: the model cannot be copied, or does not run with the example inputs.
    """
    name, share = _check(params, flops, norm, scope)
    layer_inputs(model, example_inputs, ())  # it runs, or says why not

    def size(m: nn.Module) -> int:
        return count_params(m) if name == "params" else count_inputs(m, example_inputs, ())[1]

    units = list(_units(replace_layers(model, {}), example_inputs, norm, scope))
    units = _usable(model, example_inputs, [unit for unit in units if len(unit.order)])
    levels = np.unique(np.concatenate([[-math.inf], *(unit.levels for unit in units)]))
    limit = math.floor(share * size(model) + 1e-9)
    low, high = 0, len(levels) - 1  # above the budget below levels[low]; within it at levels[high], if at all
    while low < high:
        middle = (low + high) // 2
        met = size(_prune(model, example_inputs, units, levels[middle])) <= limit
        low, high = (low, middle) if met else (middle + 1, high)
    result = _prune(model, example_inputs, units, levels[low])
    if size(result) > limit:
        least = math.ceil(10_000 * size(result) / max(size(model), 1)) / 10_000
        raise BudgetError(
            f"{name}={share:g} cannot be met by removing filters: the smallest reachable is {name}={least:g}, with one "
            f"filter in each of {len(units)} layers or sets of layers that can be pruned"
        )
    return result
