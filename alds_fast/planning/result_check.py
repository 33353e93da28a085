"""What plans and compressed models are looked at for before they are given back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..allocation import Candidates
from ..criteria import CRITERIA, is_spectrum_of
from ..errors import ModelError
from ..layers import AbsentWeight, DecomposableLayer, LowRankLayer, count_params, find_layers, label
from ..measurement import LayerCall, Watch, check_runs, fingerprint, output_tensors, private_runs, watching
from .plan_rows import LayerPlan

LOST = 0.9  # error above which next to nothing of a layer is left
LOST_TEXT = "the budget leaves next to nothing of some layers"
APART = 1.5  # times the stated errors, above which those on samples kept aside are warned of
_SAME = 1e-3  # relative: sums over values that differ by the order in which a library adds


def check_result(small: nn.Module, chosen: Iterable[str], params: int) -> None:
    """ModelError unless the model has low-rank layers of finite values at these places, and so many parameters."""
    modules = dict(small.named_modules(remove_duplicate=False))
    for name in chosen:
        layer = modules.get(name)
        if not isinstance(layer, LowRankLayer):
            raise ModelError(
                f"layer {label(name)} was not replaced: it is a {type(layer).__name__} in the copy of the model; leave "
                f"it out with exclude={[name]!r}"
            )
        for kind, value in layer.named_parameters():
            if not bool(value.isfinite().all()):
                raise ModelError(
                    f"layer {label(name)}: its {kind} has values outside the range of {value.dtype}; leave it out with "
                    f"exclude={[name]!r}, or compress the model in a wider type"
                )
    if count_params(small) != params:
        raise ModelError(
            f"the compressed model has {count_params(small):,} parameters, its plan {params:,}: something in the model "
            f"holds on to dense weights, or holds the new ones twice"
        )


def check_way(model: nn.Module, small: nn.Module, chosen: Iterable[str], inputs: Any, called: str) -> list[Tensor]:
    """The dense model's outputs; ModelError unless the model with low-rank layers goes the same way on the inputs.

    Its low-rank layers give what the dense ones do for that, so that every value must be the dense model's: where one
    is not, the code asks for the type of a layer, or calls dense layers that it holds past the model's modules.
    ``called`` is what errors call the inputs. Both models are left as they were.
    """
    places = [dict(m.named_modules(remove_duplicate=False)) for m in (model, small)]
    replaced = [name for name in chosen if isinstance(places[1].get(name), LowRankLayer)]
    dense, low_rank = ({name: modules[name] for name in replaced} for modules in places)

    def run_dense() -> tuple[Watch, list[Tensor]]:
        with watching(dense) as watch:
            return watch, output_tensors(check_runs(model, inputs, called))

    seen, before = run_dense()
    with _saying_that_it_runs_not(small), watching(low_rank, dense) as watch, private_runs(small) as run:
        after = output_tensors(run(inputs, 0, "example_inputs"))
    expected, way = _way(seen, before), _way(watch, after)
    apart = _first_apart(expected, way)
    if apart is not None and _first_apart(expected, _way(*run_dense())) is None:  # or no run is like another
        raise ModelError(_text_of_apart(expected[min(apart, len(expected) - 1)], way))
    return before


def check_run(small: nn.Module, inputs: Any, before: list[Tensor]) -> None:
    """ModelError unless the compressed model runs, with outputs that are finite where the dense one's, ``before``, are.

    The model is left as it was.
    """
    with _saying_that_it_runs_not(small), private_runs(small) as run:
        after = output_tensors(run(inputs, 0, "example_inputs"))
    lost = [i for i, (x, y) in enumerate(zip(before, after, strict=False)) if _finite(x) and not _finite(y)]
    if lost:
        raise ModelError(
            f"output {lost[0]} of the compressed model is not finite where the dense model's is: a value between two "
            f"factors is outside the range of the type; compress the model in a wider type"
        )


@contextmanager
def naming_readers(small: nn.Module) -> Iterator[None]:
    """What a model raises because it wants a dense weight that is not there becomes a ModelError with the layer."""
    try:
        yield
    except Exception as e:
        reader = _reader(small, e)
        if reader is None:
            raise
        raise ModelError(
            f"the compressed model does not run: it computes with the weight of layer {label(reader)} instead of "
            f"calling it; leave that out with exclude={[reader]!r}"
        ) from e


@contextmanager
def _saying_that_it_runs_not(small: nn.Module) -> Iterator[None]:
    try:
        with naming_readers(small):
            yield
    except ModelError:
        raise
    except Exception as e:
        raise ModelError(f"the compressed model does not run ({type(e).__name__}: {e})") from e


def _way(watch: Watch, outputs: Iterable[Tensor]) -> list[LayerCall]:
    """The calls of a run, and its outputs as calls of nothing."""
    return [*watch.calls, *(fingerprint("", y) for y in outputs)]


def _first_apart(expected: Sequence[LayerCall], way: Sequence[LayerCall]) -> int | None:
    """From which call on two runs are apart; None for runs that are not."""
    for i, (x, y) in enumerate(zip(expected, way, strict=False)):
        same = math.isclose(x.total, y.total, rel_tol=_SAME) or (math.isnan(x.total) and math.isnan(y.total))
        if x[:2] != y[:2] or not same:
            return i
    return None if len(expected) == len(way) else min(len(expected), len(way))


def _text_of_apart(at: LayerCall, way: Sequence[LayerCall]) -> str:
    if at.name and at.name not in {call.name for call in way}:
        return (
            f"layer {label(at.name)} is called in the dense model and not in its copy: its code asks for the type of a "
            f"layer (isinstance), or something past the model's modules (a list, a global variable) holds the dense "
            f"one; leave it out with exclude={[at.name]!r}"
        )
    place = f"its call of layer {label(at.name)}" if at.name else "its output"
    return (
        f"the compressed model does something else than the dense one before {place}, even where its low-rank layers "
        f"give the dense ones' values: its code asks for the type of a layer (isinstance), or holds a dense one past "
        f"the model's modules; leave that layer out with exclude="
    )


def _finite(y: Tensor) -> bool:
    return not y.is_floating_point() or bool(torch.isfinite(y).all())


def _reader(small: nn.Module, error: BaseException | None) -> str | None:
    """The layer whose dense weight the model asked for, by the error that says that there is none."""
    while error is not None:
        weight = getattr(error, "obj", None)
        if isinstance(weight, AbsentWeight):
            layers = ((n, m) for n, m in small.named_modules() if isinstance(m, LowRankLayer))
            return next((name for name, layer in layers if weight.stands_for(layer)), None)
        error = error.__cause__ or error.__context__
    return None


def warn_if_changed(model: nn.Module, spectra: Mapping[str, Tensor]) -> None:
    """Say so where a model's layers have other weights than those whose spectra are given by name."""
    layers = {layer.name: layer for layer in find_layers(model) if isinstance(layer, DecomposableLayer)}
    changed = [n for n, values in spectra.items() if n in layers and not is_spectrum_of(layers[n], values)]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        warnings.warn(
            f"layer {label(changed[0])}{more}: the weight has changed since it was analysed; the factors are of the "
            f"weight as it is, ranks and errors of what it was: analyze(model) and plan again",
            stacklevel=4,
        )


def warn_of_plan(
    rows: Sequence[LayerPlan], criterion: str, weights: Mapping[str, float], error: float | None,
    chosen: Mapping[str, tuple[Candidates, int, str]],
) -> None:  # fmt: skip
    """Say what of a plan is not what a user may expect of it.

    ``weights`` are the factors of the errors, ``chosen`` all choices of the layers and the one taken, by layer name;
    ``error`` is what was asked for, None for another budget.
    """
    warn_if_apart(rows, weights)
    if error is None:
        warn_of_lost(rows, criterion, weights)
    else:
        warn_if_boundless(error, rows, criterion, chosen)


def warn_if_apart(rows: Sequence[LayerPlan], weights: Mapping[str, float]) -> None:
    """Say so where errors are larger on samples that were kept aside: factors fit those of calibration, not others.

    Smaller ones are no fault of the factors: stated errors are cautious where samples are few, and those kept aside may
    be easy ones. ``weights`` are the factors of the stated errors, by layer name.
    """
    pairs = [(row.error, weights.get(row.name, 1.0) * row.held_out) for row in rows if row.held_out is not None]
    if not pairs:
        return
    stated, held_out = (math.hypot(*errors) for errors in zip(*pairs, strict=True))
    if held_out > APART * stated:
        warnings.warn(
            f"on samples kept aside the layers' errors are {held_out:.3g}, larger than the {stated:.3g} stated (root "
            f"of the sum of squares): data= is not enough, or too much alike; pass more samples that differ",
            stacklevel=4,
        )


def warn_if_boundless(
    error: float, rows: Sequence[LayerPlan], criterion: str, chosen: Mapping[str, tuple[Candidates, int, str]]
) -> None:
    """Say so where an error allows all layers their fewest parameters: shares are below 1, sensitivities far below."""
    taken = [(choices.costs[at], choices.costs.min()) for choices, at, _ in chosen.values() if choices.curves]
    if taken and all(cost == least for cost, least in taken) and (error >= 1 or CRITERIA[criterion].needs_gradients):
        warnings.warn(
            f"error={error:g} bounds nothing: every layer gets the fewest parameters that it can have, with errors up "
            f"to {max(row.error for row in rows):.3g}; give less than that",
            stacklevel=4,
        )


def warn_of_lost(rows: Sequence[LayerPlan], criterion: str, weights: Mapping[str, float]) -> None:
    """Say so where a budget leaves next to nothing of layers, by a criterion whose errors are shares of what is there.

    ``weights`` are the factors of the errors, by layer name.
    """
    lost = []
    for row in rows:
        weight = weights.get(row.name, 1.0)
        relative = not CRITERIA[row.criterion or criterion].needs_gradients
        if row.choice is not None and relative and weight > 0 and row.error / weight > LOST:
            lost.append(label(row.name))
    if lost:
        names = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        warnings.warn(
            f"{LOST_TEXT}: errors above {LOST:g} of {names}; a larger budget, or "
            f"pins= with min_keep for these, keeps more, and training afterwards (retrain, distill) may bring it back",
            stacklevel=4,
        )
