"""The spectra and the plan of a checkpoint directory, in its journal, made by one process or several."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from ...allocation import least_error_of_pivots, prune_spectra
from ...criteria import DEFAULT_CRITERION, Key, LayerSpectra, exact_spectra, layer_spectra
from ...errors import FileFormatError, PlanError
from ...files import write_whole
from ...layers import DecomposableLayer, count_params
from ...planning import Analysis, Plan
from ..pretrained import PLAN
from .stored_spectra import DOUBT, _deciding_settings, _exact, check_sums, exact_values, in_doubt, kind_of, spectra_of
from .streamed_model import Work


def find_spectra(work: Work) -> None:
    """The spectra of all layers, in the journal."""
    ready, settings, journal, kind = work.ready, work.settings, work.journal, kind_of(work.settings.float32_first)
    options = (settings.schemes, settings.groups, settings.criterion or DEFAULT_CRITERION, settings.align)
    for batch in work.in_batches("spectra", [i for i in ready if not journal.has(kind, i)]):
        layers = [ready[i] for i in batch]
        least = {layer.name: least_error_of_pivots(layer) for layer in layers} if settings.pivots else None
        with work.weights(layers) as sums:
            if settings.data is None:
                pinned = {n for n, pin in work.pins.items() if pin.limits or "memory" in settings.budget}
                float32 = settings.float32_first
                results: Iterable[LayerSpectra] = prune_spectra(layers, *options, least, float32=float32, whole=pinned)
            else:  # what is best by the weights alone need not be so by data
                results = layer_spectra(layers, settings.schemes, settings.groups or "divisors")
        for number, spectra in zip(batch, results, strict=True):
            tensors = {f"{scheme}.{k}": values for (scheme, k), values in spectra.values.items()}
            notes = {"top": spectra.top, "crc32": sums[spectra.layer.name], "single": bool(spectra.float32)}
            journal.put(kind, number, tensors, notes)


def _find_exact(work: Work) -> None:
    """The float64 spectra that are in doubt, in the journal."""
    ready, journal = work.ready, work.journal
    missing: dict[int, list[Key]] = {}
    for number, key in sorted(in_doubt(work)):
        if not journal.has(_exact(key), number):
            missing.setdefault(number, []).append(key)
    for batch in work.in_batches("spectra in doubt", list(missing)):
        numbers = {ready[i].name: i for i in batch}
        with work.weights([ready[i] for i in batch]) as sums:
            check_sums(work, {i: spectra_of(work, i)[1] for i in batch}, sums)
            for layer, key, values in exact_spectra([(ready[i], key) for i in batch for key in missing[i]]):
                journal.put(_exact(key), numbers[layer.name], {"values": values}, {})


def find_plan(work: Work) -> Plan:
    """The plan: made by one process, read by all, who compute what it asks for in float64 meanwhile."""
    path = work.journal.folder / PLAN
    if work.world.first and not path.exists():
        spectra = {layer.name: spectra_of(work, i)[0] for i, layer in work.ready.items()}
        parts = tuple(work.layers), spectra, count_params(work.model), work.model
        analysis = Analysis(*parts, recompute_in_float64=lambda wanted: _recompute_by_all(work, wanted))
        s = work.settings
        options = {"criterion": s.criterion, "p": s.p, "align": s.align, "pivots": s.pivots, "progress": False}
        plan = analysis.plan(**s.budget, **options, **s.pinned)  # type: ignore[arg-type]
        write_whole(path, [plan.to_json().encode()])
    work.world.together()
    while not path.exists():
        _find_exact(work)
        work.world.together()
    _find_exact(work)  # what a plan of an earlier run needed, and has been lost since
    try:
        return Plan.from_json(path.read_text())
    except (PlanError, ValueError) as e:
        raise FileFormatError(f"{str(path)!r} is damaged ({e}); remove it and run the same command again") from e


def _recompute_by_all(
    work: Work, wanted: Sequence[tuple[DecomposableLayer, Key]]
) -> Iterator[tuple[DecomposableLayer, Key, Tensor]]:
    """Spectra in float64, computed by all processes; the first one asks."""
    numbers = {layer.name: i for i, layer in work.ready.items()}
    known, asked = in_doubt(work), {(numbers[layer.name], key) for layer, key in wanted}
    if not known.issuperset(asked):
        told = sorted((i, *key) for i, key in known | asked)
        write_whole(
            work.journal.folder / DOUBT, [json.dumps({"job": _deciding_settings(work), "spectra": told}).encode()]
        )
    work.world.together()
    _find_exact(work)
    return ((layer, key, exact_values(work, numbers[layer.name], key)) for layer, key in wanted)
