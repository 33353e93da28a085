"""What errors are measured by: a criterion, and what of the data is to be believed, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from torch import Tensor

from ..layers import DecomposableLayer, oriented_weight
from ..processes import World
from .moments import Moments
from .one_slice import OneSlice, one_slice
from .registry import CRITERIA, DEFAULT_CRITERION, WITHOUT_GRADIENTS
from .weighted_errors import Bases, bases_of, errors, falling, held_out_errors
from .weights import Weighting, noise_share, squared_norm, unknown_share, weight_for_errors, weighting

LEAST_NOISE = 0.02  # share below which more than it is not tried
MOST_NOISE = 0.95  # mean share of the layers, above which data are not used unless a criterion is asked for
NOT_NEAR = 1.25  # mean ratio of errors of calibration to those on samples kept aside, from which on the latter count
NO_ERROR = 1e-3  # below which ratios say nothing
MAX_DATA_GROUPS = 8  # channel slices tried with data where groups= is "divisors"
OfLayer = TypeVar("OfLayer")


@dataclass(frozen=True)
class Basis:
    """What errors are measured by: a criterion of ``CRITERIA`` and, where it needs data, the layers' moments.

    ``bias_correction``: biases take up the mean of the error, which then does not count.
    """

    criterion: str
    moments: Mapping[str, Moments] = field(default_factory=dict, repr=False, compare=False)
    bias_correction: bool = True
    _criteria: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    _shares: dict[str, float] = field(default_factory=dict, repr=False, compare=False)
    _errors: dict[tuple[str, int, int, bool], Tensor] = field(default_factory=dict, repr=False, compare=False)
    # what is kept of the last layer:
    _last: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)
    _bases: dict[tuple[str, int, int], Bases] = field(default_factory=dict, repr=False, compare=False)
    _apart: dict[str, float | None] = field(default_factory=dict, repr=False, compare=False)
    _unknown: dict[str, float | None] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """What is kept for the last layer is not pickled with a plan."""
        return {**vars(self), "_last": {}, "_bases": {}}

    def of_all(
        self, layers: Sequence[DecomposableLayer], world: World, find: Callable[[DecomposableLayer], OfLayer]
    ) -> list[OfLayer]:
        """Something about each layer; of several processes one works it out, and what is kept here is told to all."""
        if self.used and world.size > 1:
            for layer in world.share(layers, lambda layer: float(layer.shape.numel * layer.shape.smaller_side)):
                find(layer)
            kept: tuple[dict[Any, Any], ...] = self._criteria, self._shares, self._errors, self._apart, self._unknown
            for told in world.tell(kept):
                for own, found in zip(kept, told, strict=True):
                    own.update(found)
        return [find(layer) for layer in layers]

    def look_at(self, layer: DecomposableLayer) -> None:
        """Find out what :meth:`untold` and :meth:`goes_by_samples_kept_aside` ask of a layer."""
        self._once(self._unknown, layer, self._unknown_share)
        self._once(self._apart, layer, self._distance)

    @staticmethod
    def _once(known: dict[str, float | None], layer: DecomposableLayer, find: Callable[..., float | None]) -> Any:
        if layer.name not in known:
            known[layer.name] = find(layer)
        return known[layer.name]

    def of_parts(self, moments: Mapping[str, Moments], names: Collection[str]) -> Basis:
        """That of a model in which the layers ``names`` are parts of what they were, with their moments.

        How much of these is noise, and how near errors are to those kept aside, is what it was of the whole layers.
        """
        errors = {key: known for key, known in self._errors.items() if key[0] not in names}
        return replace(self, moments=moments, _errors=errors, _shares={**self._shares}, _apart={**self._apart},
                       _unknown={**self._unknown}, _last={}, _bases={})  # fmt: skip

    @property
    def known(self) -> dict[tuple[str, int, int, bool], Tensor]:
        """Errors that were worked out, by layer, scheme, slices, and whether on the rows kept aside; to be added to."""
        return self._errors

    @property
    def used(self) -> bool:
        """Whether the criterion uses data."""
        return CRITERIA[self.criterion].needs_data

    def criterion_of(self, name: str) -> str:
        """What a layer is judged by: the criterion, or the next best where data or gradients do not reach it."""
        if not self.used:
            return self.criterion
        if name not in self.moments:
            return DEFAULT_CRITERION
        if name not in self._criteria:  # which looks at its moments
            gradient = self.moments[name].gradient
            reached = gradient is not None and bool(gradient.any())
            missing = CRITERIA[self.criterion].needs_gradients and not reached
            self._criteria[name] = WITHOUT_GRADIENTS if missing else self.criterion
        return self._criteria[name]

    def remark(self, name: str) -> str | None:
        """Why a layer is judged by another criterion, or what its moments lack; None for nothing."""
        criterion = self.criterion_of(name)
        if criterion != self.criterion:
            missing = "no gradient" if CRITERIA[criterion].needs_data else "no data"
            return f"{missing} reached it: judged by {criterion!r}"
        gradient = self.moments[name].gradient if CRITERIA[criterion].needs_gradients else None
        return "its gradients are known as a diagonal" if gradient is not None and gradient.dim() == 2 else None

    def weighting(self, layer: DecomposableLayer, for_errors: bool = False) -> Weighting | None:
        """How this layer's errors are weighted; None where it is judged without data.

        ``for_errors``: no factors are to be made from it, see :func:`alds_fast.criteria.weights.weight_for_errors`.
        """
        if not CRITERIA[self.criterion_of(layer.name)].needs_data:
            return None
        if for_errors:
            return self._weights_for_errors(layer)
        share = self._share(layer)
        for kept in (self._last, self._bases):  # for errors, and as large as the moments
            kept.clear()
        return self._weighting(layer, share)

    def untold(self, layers: Sequence[DecomposableLayer]) -> bool:
        """Whether the data tell next to nothing: what they show of the layers' inputs and gradients is noise."""
        found = (self._once(self._unknown, layer, self._unknown_share) for layer in layers)
        shares = [share for share in found if share is not None]
        return bool(shares) and sum(shares) / len(shares) > MOST_NOISE

    def _unknown_share(self, layer: DecomposableLayer) -> float | None:
        """How much is noise of what is known best of a layer; None where it is judged without data."""
        criterion = CRITERIA[self.criterion_of(layer.name)]
        if not criterion.needs_data:
            return None
        m = self.moments[layer.name]
        whole = m.output if m.second is None else m.second
        assert whole is not None
        share = unknown_share(squared_norm(whole), m.noise)
        if not criterion.needs_gradients or m.gradient is None:
            return share
        return min(share, unknown_share(squared_norm(m.gradient), m.gradient_noise))

    def goes_by_samples_kept_aside(self, layers: Sequence[DecomposableLayer]) -> bool:
        """Whether layers are to be compared by their errors there: where those of calibration are not near them.

        Of calibration a part is what the data do not tell, of one layer more than of another.
        """
        found = (self._once(self._apart, layer, self._distance) for layer in layers)
        known = [distance for distance in found if distance is not None]
        return bool(known) and sum(known) / len(known) > math.log(NOT_NEAR)

    def _distance(self, layer: DecomposableLayer) -> float | None:
        """Mean logarithm of the ratio of the two kinds of errors, either way, over the ranks of one slice."""
        if not self.compares_aside(layer):
            return None
        stated, held_out = self.fold_errors(layer, 0, 1), self.fold_errors(layer, 0, 1, held_out=True)
        sure = (stated > NO_ERROR) & (held_out > NO_ERROR)
        return float((stated[sure] / held_out[sure]).log().abs().mean()) if bool(sure[1:].any()) else None

    def has_kept_aside(self, layer: DecomposableLayer) -> bool:
        """Whether a layer is judged by data, and rows of samples are kept aside."""
        judged = CRITERIA[self.criterion_of(layer.name)].needs_data
        return judged and self.moments[layer.name].held is not None

    def compares_aside(self, layer: DecomposableLayer) -> bool:
        """Whether its errors there are of the same kind as those of its criterion, which is no bound."""
        return self.has_kept_aside(layer) and CRITERIA[self.criterion_of(layer.name)].rule is errors

    def fold_errors(self, layer: DecomposableLayer, scheme: int, groups: int, held_out: bool = False) -> Tensor:
        """Relative errors of ranks 0..r of a layer that is judged by data, computed once.

        With ``held_out`` on the rows that are kept aside, of which there must be some; never growing with the rank.
        """
        key = layer.name, scheme, groups, held_out
        if key not in self._errors and key[1:3] == (0, 1) and CRITERIA[self.criterion_of(layer.name)].rule is errors:
            share = self._share(layer)  # which keeps them where it tries several
            if key not in self._errors:
                self._keep_of_one_slice(layer, self._one_slice(layer).errors(share))
        elif key not in self._errors:
            weights = self._weights_for_errors(layer)
            rule = CRITERIA[self.criterion_of(layer.name)].rule
            if held_out:
                found = held_out_errors(weights, scheme, groups, self._known_bases(weights, *key[:3]))
                self._errors[key] = falling(found)
            elif rule is errors:
                self._errors[key] = errors(weights, scheme, groups, self._known_bases(weights, *key[:3]))
            else:
                self._errors[key] = rule(weights, scheme, groups)
        return self._errors[key]

    def _keep_of_one_slice(self, layer: DecomposableLayer, found: tuple[Tensor, Tensor | None]) -> None:
        self._errors[layer.name, 0, 1, False] = found[0]
        if found[1] is not None:
            self._errors[layer.name, 0, 1, True] = falling(found[1])

    def _known_bases(self, weights: Weighting, name: str, scheme: int, groups: int) -> Bases:
        """Those of the slices, which errors of both kinds are computed from."""
        key = name, scheme, groups
        if key not in self._bases:
            self._bases.clear()
            self._bases[key] = bases_of(weights, scheme, groups)
        return self._bases[key]

    def _weighting(self, layer: DecomposableLayer, share: float, few: Tensor | None = None) -> Weighting:
        weight, centred = oriented_weight(layer.module), self.bias_correction and layer.own_bias
        return weighting(layer.shape, weight, self.moments[layer.name], centred, self._sensitive(layer), share, few)

    def _sensitive(self, layer: DecomposableLayer) -> bool:
        return CRITERIA[self.criterion_of(layer.name)].needs_gradients

    def _of_last(self, layer: DecomposableLayer, what: str, make: Callable[[], Any]) -> Any:
        """What is kept of one layer at a time."""
        if layer.name not in self._last:
            self._last.clear()
        kept = self._last.setdefault(layer.name, {})
        if what not in kept:
            kept[what] = make()
        return kept[what]

    def _few(self, layer: DecomposableLayer) -> Tensor | None:
        parts = layer.shape, oriented_weight(layer.module), self.moments[layer.name], self._sensitive(layer)
        return cast("Tensor | None", self._of_last(layer, "few", lambda: weight_for_errors(*parts)))

    def _weights_for_errors(self, layer: DecomposableLayer) -> Weighting:
        """No factors are to be made from them, see :func:`alds_fast.criteria.weights.weight_for_errors`."""
        share, few = self._share(layer), self._few(layer)
        return cast(Weighting, self._of_last(layer, "weights", lambda: self._weighting(layer, share, few)))

    def _one_slice(self, layer: DecomposableLayer) -> OneSlice:
        weight, centred = oriented_weight(layer.module), self.bias_correction and layer.own_bias
        parts = layer.shape, weight, self.moments[layer.name], centred, self._sensitive(layer), self._few(layer)
        return cast(OneSlice, self._of_last(layer, "one", lambda: one_slice(*parts)))

    def _share(self, layer: DecomposableLayer) -> float:
        """How much of a layer's covariance goes to the identity: its share of noise or, if that does better, more.

        What does best on the rows that are kept aside, over all ranks, with one slice.
        """
        if layer.name not in self._shares:
            noise = noise_share(layer.shape, oriented_weight(layer.module), self.moments[layer.name])
            best = noise
            if self.moments[layer.name].held is not None and noise >= LEAST_NOISE:
                one = self._one_slice(layer)
                tried = {share: one.errors(share) for share in (noise, (1.0 + noise) / 2, 1.0)}
                best = min(tried, key=lambda share: _mean_logarithm(tried[share][1]))
                if CRITERIA[self.criterion_of(layer.name)].rule is errors:
                    self._keep_of_one_slice(layer, tried[best])
            self._shares[layer.name] = best
        return self._shares[layer.name]


def _mean_logarithm(held_out: Tensor | None) -> float:
    assert held_out is not None
    return float(held_out.clamp_min(1e-12).log().mean())
