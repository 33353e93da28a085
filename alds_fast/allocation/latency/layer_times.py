"""What every candidate of every layer costs in time, measured on the device for a few ranks of each curve.

For every distinct kind of layer call (shape, options, type, input) and every (scheme, groups) up to four ranks, spaced
by a factor of three up to the largest that is smaller than dense, are timed taking turns with the dense layer; what is
kept is the ratio, so that the drift of a busy machine cancels. Smaller ranks go first: once one is not faster than
dense, larger ones are not timed but taken to cost in proportion to the rank. Between ranks the ratio is
interpolated, below the smallest it is that of the smallest, and it never falls with the rank.

A layer costs calls x dense milliseconds x ratio, in whole nanoseconds. Dense layers are timed inside of the model's
runs; on CUDA, where these are graphs, alone, taking turns with it. What the model takes beyond its layers is the fixed
part. More than ``MAX_LATENCY_GROUPS`` channel slices are not tried (a layer analysed for more slices only keeps its
fewest): there are hundreds of such curves, thin slices run badly, and each would have to be timed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from ...layers import DecomposableLayer, LowRankLayer
from ...linalg import Decomposition
from ...measurement import (
    STEADY,
    InputSpec,
    Ratios,
    Timed,
    Timings,
    call_model,
    copy_batch,
    inference,
    interleaved_ms,
    keeping_state,
    median_ratio,
    ms_by_part,
    paired_ratios,
    quartile_spread,
)
from ...progress import Progress, tell_nobody
from ..candidates import Candidates, Curve
from ..costs import Calls, CostTable
from ..pareto import Floats, Ints
from .random_models import REPEATS, random_low_rank

MAX_LATENCY_GROUPS = 8  # channel slices that are tried under latency=
LEVELS, SPACING = 4, 3
ROUNDS = 5
NS_PER_MS = 1_000_000


def call_key(layer: DecomposableLayer, spec: InputSpec) -> str:
    """Everything that the time of a layer's call depends on beside the hardware, as JSON."""
    module: Any = layer.module
    names = ["stride", "padding", "dilation", "padding_mode", *["output_padding"] * getattr(module, "transposed", 0)]
    options = {n: getattr(module, n) for n in names if hasattr(module, n)}
    weight: dict[str, Any] = {"shape": layer.weight, "dtype": str(module.weight.dtype)}
    if isinstance(module, LowRankLayer):
        weight["factors"] = module.decomposition.to_dict()
    else:
        weight["strides"] = module.weight.stride()
    bias = getattr(module, "bias", None) is not None
    fields: dict[str, Any] = {"kind": layer.kind, "weight": weight, "bias": bias, "options": options}
    fields |= {"conv_groups": layer.shape.conv_groups if layer.shape else 1, "input": spec.to_dict()}
    return json.dumps(fields, sort_keys=True)


def _time(module: nn.Module, spec: InputSpec, wanted: Sequence[Decomposition], known: Ratios) -> None:
    """Add the ratios of these choices to what is known: of more rounds where rounds are far apart."""
    if not wanted:
        return
    x = spec.make()
    dense = spec.caller(module, x)
    left = {str(d): (d, spec.caller(random_low_rank(module, d), x)) for d in wanted}
    ratios: dict[str, list[float]] = {name: [] for name in left}
    for _ in range(REPEATS):
        sides = {"dense": dense} | {name: call for name, (_, call) in left.items()}
        times = interleaved_ms(sides, spec.device, rounds=ROUNDS)
        for name, (d, _) in list(left.items()):
            ratios[name] += paired_ratios(times, name, "dense")
            timed = Timed(median(ratios[name]), quartile_spread(ratios[name]))
            known.setdefault(_curve_key(d), {})[d.rank] = timed
            if timed.steady:
                del left[name]
        if not left:
            break


def _curve_key(d: Decomposition) -> tuple[int, int, str]:
    """What its timings are filed under, beside the rank."""
    return d.scheme, d.groups, d.pivots


def _rank(curve: Curve, level: int) -> int:
    """The rank of a curve that is timed at a level, the last level being the largest rank."""
    least, top = int(curve.ranks[0]), int(curve.ranks[-1])
    return max(least, round(top / SPACING ** (LEVELS - 1 - level) / curve.align) * curve.align)


def _survey(module: nn.Module, spec: InputSpec, curves: Iterable[Curve], known: Ratios) -> bool:
    """Time the ranks of all levels that are not known, of a curve until it is not faster than dense; True if any."""
    timed = False
    for level in range(LEVELS):
        wanted = []
        for curve in curves:
            rank = _rank(curve, level)
            ratios = known.get(_curve_key(curve.decomposition(rank)), {})
            if rank not in ratios and not any(timed.ratio >= 1 for r, timed in ratios.items() if r < rank):
                wanted.append(curve.decomposition(rank))
        _time(module, spec, sorted(set(wanted)), known)
        timed = timed or bool(wanted)
    return timed


def interpolate(known: Mapping[int, float], ranks: Ints) -> Floats:
    """Ratios for all ranks: piecewise linear, never falling, beyond the largest rank known in proportion to the rank.

    >>> interpolate({2: 0.5, 4: 0.4, 6: 0.9}, np.array([1, 3, 5, 6, 12]))
    array([0.5, 0.5, 0.7, 0.9, 1.8])
    """
    xs = np.array(sorted(known), dtype=np.float64)
    ys = np.maximum.accumulate([known[int(x)] for x in xs])
    return np.interp(ranks, xs, ys) * np.maximum(1.0, ranks / xs[-1])


class LayerTimes:
    """The timings of a model's layers: measured when made, and again around a choice by :meth:`look_closer`.

    Args:
        model: the dense model; ``layers`` are those of ``choices``, ``calls`` what they are called with in one run.
        timings: what is known already, and where to keep what is measured; ``tell``: told how many calls are timed.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, layers: Sequence[DecomposableLayer], choices: Sequence[Candidates],
        calls: Calls, timings: Timings, device: torch.device, tell: Progress = tell_nobody,
    ) -> None:  # fmt: skip
        self._layers, self._choices, self._calls, self._timings = layers, choices, calls, timings
        self._sites: dict[str, tuple[nn.Module, InputSpec, list[Curve]]] = {}
        for layer, choice in zip(layers, choices, strict=True):
            for spec in calls[layer.name]:
                curves = self._sites.setdefault(call_key(layer, spec), (layer.module, spec, []))[2]
                curves += choice.curves
        for count, (text, (module, spec, curves)) in enumerate(self._sites.items(), 1):
            if _survey(module, spec, curves, timings.of(text)):
                timings.save()
            tell("timings of layers", count, len(self._sites))
        self._time_dense(model, example_inputs, device)

    def warn_if_unsteady(self) -> None:
        """A UserWarning that says how many of the timings have rounds that are far apart, if there are any."""
        timed = [t for text in self._sites for known in self._timings.of(text).values() for t in known.values()]
        unsteady = sum(not t.steady for t in timed)
        if unsteady:
            warnings.warn(
                f"latency=: {unsteady} of {len(timed)} timings of layers have rounds that are more than {STEADY:.0%} "
                f"apart after {REPEATS * ROUNDS} of them: the machine is busy; other plans will measure these anew",
                stacklevel=3,
            )

    def _time_dense(self, model: nn.Module, example_inputs: Any, device: torch.device) -> None:
        """Of every call of every layer, of the whole model, and of this beside its layers."""
        keys = {(layer.name, spec): call_key(layer, spec) for layer in self._layers for spec in self._calls[layer.name]}
        with inference(model), keeping_state(model):
            run = partial(call_model, model, copy_batch(example_inputs))
            if device.type == "cuda":  # where a run is a graph
                sides = {text: spec.caller(module, spec.make()) for text, (module, spec, _) in self._sites.items()}
                times = interleaved_ms({**sides, "": run}, device, rounds=ROUNDS)
                whole = median(times[""])
                ms = {key: median_ratio(times, text, "") * whole for key, text in keys.items()}
            else:
                modules = {layer.name: layer.module for layer in self._layers}
                whole, inside = ms_by_part(run, modules, rounds=2 * ROUNDS, repeats=REPEATS, steady=STEADY)
                ms = {key: inside.get(key, 0.0) / self._calls[key[0]][key[1]] for key in keys}
        self._dense_ns = {key: NS_PER_MS * each for key, each in ms.items()}
        of_layers = sum(self._layer_dense_ns(layer) for layer in self._layers)
        self._fixed_ns = max(0, round(NS_PER_MS * whole) - of_layers)
        self.total_ns = self._fixed_ns + of_layers

    def _layer_dense_ns(self, layer: DecomposableLayer) -> int:
        return round(sum(n * self._dense_ns[layer.name, spec] for spec, n in self._calls[layer.name].items()))

    def _curve_ns(self, layer: DecomposableLayer, curve: Curve) -> Ints:
        """Nanoseconds of all ranks of a curve over all calls of the layer."""
        total = np.zeros(len(curve.costs))
        for spec, count in self._calls[layer.name].items():
            text = call_key(layer, spec)
            known = self._timings.of(text)[_curve_key(curve.decomposition(1))]
            ratios = {rank: timed.ratio for rank, timed in known.items()}
            total += count * self._dense_ns[layer.name, spec] * interpolate(ratios, curve.ranks)
        return np.rint(total).astype(np.int64)

    def table(self, share: float) -> CostTable:
        """The budget on latency."""
        costs = []
        for layer, choice in zip(self._layers, self._choices, strict=True):
            costs.append(choice.with_costs(partial(self._curve_ns, layer), self._layer_dense_ns(layer)))
        limit = int(share * self.total_ns)
        return CostTable("latency", share, tuple(costs), self._fixed_ns, self.total_ns, limit, "ms", NS_PER_MS)

    def look_closer(self, picks: Sequence[int]) -> None:
        """Time the chosen ranks themselves and their neighbours."""
        wanted: dict[str, set[Decomposition]] = {}
        for layer, choice, candidate in zip(self._layers, self._choices, picks, strict=True):
            taken = choice.decomposition(candidate)
            if taken is None:
                continue
            curve = next(c for c in choice.curves if c.decomposition(taken.rank) == taken)
            ranks = {taken.rank - curve.align, taken.rank, taken.rank + curve.align} & set(curve.ranks.tolist())
            for spec in self._calls[layer.name]:
                near = (taken._replace(rank=rank) for rank in ranks)
                wanted.setdefault(call_key(layer, spec), set()).update(near)
        for text, decompositions in wanted.items():
            module, spec, _ = self._sites[text]
            _time(module, spec, sorted(decompositions), self._timings.of(text))
        self._timings.save()
