"""Factors fitted anew to what reaches each layer in the compressed network, layer after layer as they are run.

A layer of the dense network gives y = W x. In the compressed network it gets x' instead of x. With C = E[x' x'^T] and
B = E[y x'^T], the weight that is best before truncation is W' = W + (B - W C)(C + a I)^-1, and

    E||y - V x'||^2 = tr((W' - V) C (W' - V)^T) + what no V changes        (a = 0)

so that truncating W' under C (:mod:`alds_fast.criteria.weighted_errors`) makes up for the errors of the layers before:
the asymmetric reconstruction of Zhang, Zou, He, Sun (TPAMI 2016), here for all folds and slices. The ridge a pulls
towards W where the data say little; :mod:`alds_fast.factors.refitting.ridge` chooses it by cross-validation.

Where the model is a chain of blocks (:mod:`alds_fast.blocks`), both networks go on from the end of the block before a
layer's: the time is linear in depth. Of other models every layer takes a pass from the start on.

At last the running statistics of BatchNorms move too (:mod:`alds_fast.factors.refitting.batchnorm`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ...blocks import BlockChain, LeftChain, Room
from ...criteria import Moments, unknown_share, weighting
from ...errors import ModelError
from ...layers import DecomposableLayer, LowRankLayer, filters_first, label, oriented_weight
from ...measurement import naming_batch, private_runs
from ...processes import World
from ..choice import FactorReport
from ..training import is_changed
from ..weighted import factors
from .batchnorm import move_statistics
from .cross_sums import CrossSums
from .pairs import Pairs, chain_of, in_halves, rounds, without_chain
from .ridge import best_weight
from .stages import Network, find_stages

ORDER = 8192  # columns of a layer, at most
MOST_UNKNOWN = 0.5  # share of the noise in what is seen of a layer's input, above which it is not fitted


Fitted = Any  # a low-rank layer, or a linear one without some hidden units
Gradient = tuple[Tensor | None, float]  # second moment and its noise


def _fit(
    layer: DecomposableLayer, low: Fitted, sums: CrossSums, gradient: Gradient, centred: bool
) -> FactorReport | None:
    """New factors, or weight, and bias of a layer, in place; None, and nothing, where the batches tell too little."""
    dense: Any = layer.module
    noise, norm2 = sums.noise()
    if unknown_share(norm2, noise) > MOST_UNKNOWN:
        return None
    groups = layer.shape.conv_groups
    weight = oriented_weight(dense).double().cpu().reshape(groups, -1, layer.shape.columns)
    best = best_weight(weight, sums, centred)
    seen = sums.means()
    sums.forget_products()
    if isinstance(low, LowRankLayer):
        moments = Moments(
            round(sums.rows), seen.second, seen.mean, None, gradient[0], noise, gradient[1], sums.mean_noise()
        )
        weights = weighting(layer.shape, best, moments, centred, moments.gradient is not None)
        fitted = factors(weights, low.decomposition)
        low.update_factors(fitted.left, fitted.right)
    else:
        low.weight.copy_(filters_first(low, best.reshape(weight.shape[1:])))
    cut = oriented_weight(low).double().cpu().reshape(*weight.shape)
    if centred:
        moved = sums.without_noise(lambda means: means.mean_y - (cut @ means.mean.unsqueeze(-1)).squeeze(-1))
        assert low.bias is not None
        low.bias.copy_(dense.bias.detach().double().cpu() + moved.flatten())
    norm = float(weight.norm())
    lost = math.sqrt(max(0.0, seen.lost(cut, centred)) / seen.energy) if seen.energy > 0 else 0.0
    return FactorReport("refitted", 0, float((weight - cut).norm()) / norm if norm > 0 else 0.0, lost)


Reports = dict[str, FactorReport | None]


def _told_all(fitted: Reports, low: Mapping[str, Fitted], biases: bool, world: World) -> Reports:
    """The reports of all processes, each of which has fitted a layer; all get its factors, and ``biases``."""
    if world.size == 1:
        return fitted
    reports: Reports = {}
    own = {name: {k: v.cpu() for k, v in low[name].state_dict().items() if biases or k != "bias"} for name in fitted}
    for others, values in world.tell((fitted, own)):
        reports |= others
        for name, tensors in values.items():
            for key, value in tensors.items():  # in memory of their own: what is mapped may be let go
                getattr(low[name], key).data = value.to(getattr(low[name], key).device)
    return reports


def refit(
    small: nn.Module,
    model: nn.Module,
    layers: Sequence[DecomposableLayer],
    data: Iterable[Any],
    *,
    gradients: Mapping[str, Gradient],
    bias_correction: bool,
    mask: str | None,
    chain: BlockChain | None = None,
    lists: Sequence[str] | None = None,
    known: Container[str] = (),
    rows: Mapping[str, Tensor] | None = None,
    done: Callable[[str, FactorReport | None], None] = lambda name, report: None,
    room: Callable[[], Room] = Room,
    world: World | None = None,
) -> dict[str, FactorReport]:
    """Fit the changed layers of ``small``, in place, to the outputs of ``model``; returns how, by name.

    Every layer takes a pass of both networks over all batches, from the end of the block before up to that layer, or
    from the start on where there are no blocks; layers that read one tensor share it. Left as they are, as their
    reports say: layers with more than 8192 columns, those that the first batch does not reach, those that get other
    rows in the compressed network than in the dense one (experts, say), and, with a warning, those of which the batches
    show more noise than anything else.
    ``gradients`` are the second moments that weight a layer's outputs, with their noise, where there are some;
    ``chain`` the model's blocks, if these have been found, ``lists`` where users say that they are; ``known`` the
    layers that are fitted already; ``rows``, by name, which outputs of a dense layer one has that lost others;
    ``room`` makes what keeps the blocks' outputs. ``done`` is told every layer, once it
    is fitted or left, and its report. ``world``: processes that share the batches, by their numbers, and the layers
    that are fitted together; all get all factors. All must pass the same arguments and a chain of blocks; each takes
    one batch at least.

    Raises ArgumentError for data that are no batches, ModelError if a network raised an exception or a layer sees NaN.
    """
    low: dict[str, Fitted] = {n: m for n, m in small.named_modules() if is_changed(m)}
    world = world or World()
    fitted_here = [x for x in layers if x.name in low and x.shape.columns <= ORDER and not x.is_table]
    fitting = {layer.name: layer for layer in fitted_here}
    with ExitStack() as stack:
        run_dense, run_small = (stack.enter_context(private_runs(net)) for net in (model, small))
        first, halves = in_halves(data)
        worth = halves.worth  # before samples are seen again

        def fit(name: str, sums: CrossSums) -> Reports:
            """How a layer was fitted, None where the batches tell too little; nothing where it is left."""
            if sums.rows and not sums.finite():
                raise ModelError(f"layer {name!r} sees NaN or infinite values on the batches of refit=")
            if name in known or not sums.rows or not sums.paired:
                return {}
            centred = bias_correction and fitting[name].own_bias and low[name].bias is not None
            return {name: _fit(fitting[name], low[name], sums, gradients.get(name, (None, 0.0)), centred)}

        def fit_all(chain: BlockChain) -> Reports:
            nets = Network(model, run_dense, chain, room()), Network(small, run_small, chain, room())
            reports: Reports = {}
            with naming_batch(1, "refit="):
                stages = find_stages(nets[0], first, list(fitting), chain.blocks)
            todo = [stage for stage in stages if not all(name in known for name in stage.calls)]
            for collected in Pairs(*nets, fitting, data, mask, halves, worth, room(), world, rows or {}).of_all(todo):
                for together in rounds(collected, world.size):
                    fitted = [fit(name, collected[name]) for name in together[world.rank : world.rank + 1]]
                    reports |= _told_all(fitted[0] if fitted else {}, low, bias_correction, world)
                    for name in together:
                        if name not in known:
                            done(name, reports.get(name))
            return reports

        try:
            fitted = fit_all(chain_of(model, run_dense, data, lists) if chain is None else chain)
        except LeftChain as e:  # the compressed model goes another way than the dense one
            if world.size > 1:
                raise ModelError(
                    f"refit= with {world.size} processes needs a chain of blocks: {e} in the compressed model; leave "
                    f"out torchrun"
                ) from e
            fitted = fit_all(without_chain(f"the compressed model: {e}"))
    reports = {name: report for name, report in fitted.items() if report is not None}
    untold = [name for name, report in fitted.items() if report is None]
    if untold:
        warnings.warn(
            f"refit= left {len(untold)} of {len(fitting)} layers as they were, {label(untold[0])} for one: its batches "
            f"tell too little of what they see; pass more samples that differ",
            stacklevel=3,
        )
    if reports or not untold:  # what tells too little of the layers tells nothing of statistics
        move_statistics(model, small, data)
    return reports
