"""Spectra in float32: how well they are known, and whether that decides a plan.

A float32 spectrum's squared errors of ranks are off by up to ``TAIL`` of ||W||^2, and from one rank l to the next by no
more than ``VALUE`` times s_1 s_l of the slices, where they are above ``SMALL`` in each; its norms are float64. A plan
is solved again with all errors moved by that much: of some layers the candidate that was taken upwards and all others
against it, of the other layers the reverse, so that any two layers come to be moved either way against each other, and
some times at random. Spectra between which that changes the choice are in doubt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..criteria import Key, LayerSpectra
from ..errors import ModelError
from ..layers import label
from .candidates import Candidates
from .pareto import Floats, Front, Ints, pareto_front

TAIL, VALUE = 2.0**-20, 2.0**-18
RANDOM = 16
SMALL = 2.0**-9  # squared errors of slices below it, 4.4 %, are asked for in float64: their certificate goes by them

Bools = NDArray[np.bool_]


def with_exact_values(spectra: LayerSpectra, key: Key, values: Tensor) -> LayerSpectra:
    """The spectra with those of ``key`` in float64; ModelError if they are not of the same weight."""
    squares = next(v.square().sum() for (scheme, _), v in spectra.values.items() if scheme == key[0])
    if not torch.isclose(squares, values.square().sum(), rtol=1e-9, atol=0.0):
        raise ModelError(f"layer {label(spectra.layer.name)}: its weight has changed since it was analysed")
    top = {**spectra.top, key[0]: float(values.max())} if key[1] == 1 else spectra.top
    new = {key: values} if key in spectra.values else {}
    return replace(spectra, values={**spectra.values, **new}, top=top, float32=spectra.float32 - {key})


def too_small(values: Tensor, rank: int) -> bool:
    """Whether what this rank leaves of some slice's squared norm says little in float32."""
    squares = values.square()
    return bool((squares[..., rank:].sum(-1) < SMALL * squares.sum(-1)).any())


def _moves(choices: Candidates, spectra: LayerSpectra, taken: int) -> Floats:
    """By how much squared errors may be off, of all candidates: the one taken upwards, the others against it."""
    moves = []
    for curve, start in zip(choices.curves, choices.starts, strict=False):
        values = spectra.values[curve.scheme, curve.groups]
        float32 = (curve.scheme, curve.groups) in spectra.float32 and bool(values.any())
        moves.append(np.full(len(curve.costs), -TAIL if float32 else 0.0))
        if float32 and start <= taken < start + len(curve.costs):  # to its other ranks: what lies between
            steps = VALUE * (values * values[..., :1]).flatten(0, -2).sum(0) / values.square().sum()
            reach = np.concatenate([[0.0], steps.cumsum(0).numpy()])[curve.ranks]
            moves[-1] = TAIL - np.minimum(np.abs(reach - reach[taken - start]), 2 * TAIL)
    return np.concatenate([*moves, [0.0] * choices.may_stay_dense])


def _signs(count: int) -> Bools:
    """Which of so many layers to move which way, again and again: any two apart both ways, and at random."""
    numbers, random = np.arange(count), np.random.default_rng(0)
    bits = [(numbers >> bit & 1).astype(bool) for bit in range(count.bit_length())]
    return np.array([*bits, *(~b for b in bits), *random.integers(0, 2, (RANDOM, count)).astype(bool)])


def curves_in_doubt(
    spectra: Sequence[LayerSpectra],
    choices: Sequence[Candidates],
    weights: Sequence[float],
    picks: Sequence[int],
    costs: Sequence[Ints],
    solve: Callable[[Sequence[Front]], Ints],
) -> list[tuple[str, Key]]:
    """(layer, (scheme, groups)) of float32 spectra that might have another candidate taken than those of ``picks``.

    ``solve`` finds the points to take of the layers' Pareto fronts; errors are those of the spectra times the layers'
    ``weights``. What is taken with an error of a slice so small that float32 says little of it is in doubt too.
    """

    def in_float32(i: int, candidate: int) -> set[tuple[int, Key]]:
        taken = choices[i].decomposition(candidate)
        return {(i, taken.fold)} if taken and taken.fold in spectra[i].float32 else set()

    doubt: set[tuple[int, Key]] = set()
    fronts = []  # of every layer, two: with the candidate taken at its worst, and at its best
    for i, (c, taken) in enumerate(zip(choices, picks, strict=True)):
        squares, moves = (c.errors / (weights[i] or 1.0)) ** 2, _moves(c, spectra[i], taken)
        chosen = c.decomposition(taken)
        if chosen and too_small(spectra[i].values[chosen.fold], chosen.rank):
            doubt |= in_float32(i, taken)
        moved = [weights[i] * np.sqrt(np.maximum(squares + sign * moves, 0.0)) for sign in (1, -1)]
        fronts.append([pareto_front(costs[i], errors) for errors in moved])
    for signs in _signs(len(choices)):
        side_fronts = [pair[int(side)] for pair, side in zip(fronts, signs, strict=True)]
        other = [int(f.index[k]) for f, k in zip(side_fronts, solve(side_fronts), strict=True)]
        changed = [i for i, (a, b) in enumerate(zip(picks, other, strict=True)) if a != b]
        keys = set().union(*(in_float32(i, picks[i]) | in_float32(i, other[i]) for i in changed))
        doubt |= keys if keys or not changed else {(i, key) for i, s in enumerate(spectra) for key in s.float32}
    return [(spectra[i].layer.name, key) for i, key in sorted(doubt)]
