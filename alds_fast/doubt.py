"""Spectra in float32: how well they are known, and whether that decides a plan.

A float32 spectrum's squared errors of ranks are off by up to ``TAIL`` of ||W||^2 together, and by up to ``VALUE`` times
the slices' largest squared singular values from one rank to the next (measured: less than half of either); its norms
are float64. A plan is solved again with all errors moved by that much: of some layers the candidate that was taken
upwards and all others against it, of the other layers the reverse, so that any two layers come to be moved either way
against each other. Layers whose choice that changes are in doubt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from .allocate import Floats, Front, Ints, pareto_front
from .candidates import Candidates
from .discover import label
from .errors import ModelError
from .spectra import LayerSpectra, layer_spectra

TAIL, VALUE = 2.0**-20, 2.0**-19
SMALL = 2.0**-9  # squared errors below it, 4.4 %, are asked for in float64: the factors' certificate goes by them


def check_is_possible(budgets: Sequence[str], criterion: str | None, method: str) -> bool:
    """Whether plans of this kind can be checked: one budget of params or flops, solved exactly, by Frobenius norms."""
    return list(budgets) in (["params"], ["flops"]) and criterion in (None, "frobenius") and method == "alds"


def resolved_precision(shares: Mapping[str, float | None], criterion: str | None, method: str | None) -> str:
    """The precision of spectra for a plan of this kind, made without data, if none is asked for."""
    budgets = [name for name, share in shares.items() if share is not None]
    return "float32" if check_is_possible(budgets, criterion, method or "alds") else "float64"


def in_double(spectra: Sequence[LayerSpectra]) -> list[LayerSpectra]:
    """The same of the same layers, folds and slices in float64; ModelError if a layer's weight is another one now."""
    alike: dict[tuple, list[LayerSpectra]] = {}
    for known in spectra:
        groups = tuple(sorted({k for _, k in known.values}))
        alike.setdefault((tuple(known.top), groups), []).append(known)
    found = []
    for (schemes, groups), some in alike.items():
        for old, new in zip(some, layer_spectra([s.layer for s in some], schemes, groups), strict=True):
            norms = [(old.values[k].square().sum(), new.values[k].square().sum()) for k in old.values]
            if not all(torch.isclose(a, b, rtol=1e-9, atol=0.0) for a, b in norms):
                raise ModelError(f"layer {label(new.layer.name)}: its weight has changed since it was analysed")
            found.append(new)
    return found


def _moves(choices: Candidates, spectra: LayerSpectra, taken: int) -> Floats:
    """By how much squared errors may be off, of all candidates: the one taken upwards, the others against it."""
    moves = []
    for curve, start in zip(choices.curves, choices.starts, strict=False):
        squares = spectra.values[curve.scheme, curve.groups].square()
        total = float(squares.sum())
        step = VALUE / 2 * float(squares[..., 0].sum()) / total if total else 0.0
        own = start <= taken < start + len(curve.costs)
        moves.append(np.full(len(curve.costs), TAIL - step if own else -TAIL - step))
        if own:
            moves[-1][taken - start] = TAIL + step
    return np.concatenate([*moves, [0.0]])


def layers_in_doubt(
    spectra: Sequence[LayerSpectra],
    choices: Sequence[Candidates],
    weights: Sequence[float],
    found: Sequence[int],
    costs: Sequence[Ints],
    solve: Callable[[Sequence[Front]], Ints],
) -> list[str]:
    """Names of the layers with float32 spectra for which another candidate than the ``found`` one might be taken.

    ``solve`` finds the points to take of the layers' Pareto fronts; errors are those of the spectra times the layers'
    ``weights``. Layers whose error is so small that float32 says little of it are in doubt too.
    """
    single = [i for i, s in enumerate(spectra) if s.single]
    doubt = {i for i in single if 0.0 < choices[i].errors[found[i]] ** 2 < SMALL * weights[i] ** 2}
    fronts = []  # of every layer, two: with the candidate taken at its worst, and at its best
    for i, c in enumerate(choices):
        squares, moves = c.errors**2, _moves(c, spectra[i], found[i]) if spectra[i].single else np.zeros(len(c.errors))
        moved = [np.sqrt(np.maximum(squares + sign * weights[i] ** 2 * moves, 0.0)) for sign in (1, -1)]
        fronts.append([pareto_front(costs[i], errors) for errors in moved])
    for bit in range(len(choices).bit_length() if single else 0):  # any two layers differ in one
        for turn in (0, 1):
            own = [pair[(i >> bit & 1) ^ turn] for i, pair in enumerate(fronts)]
            taken = [int(f.index[k]) for f, k in zip(own, solve(own), strict=True)]
            changed = {i for i, (old, new) in enumerate(zip(found, taken, strict=True)) if old != new}
            if changed:
                doubt |= changed.intersection(single) or set(single)
    return [spectra[i].layer.name for i in sorted(doubt)]
