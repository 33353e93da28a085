"""The spectra and the plan of a checkpoint directory, in its journal, made by one process or several."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .analysis import Analysis
from .discover import count_params, label
from .errors import FileFormatError, PlanError
from .journal import LATER, PLAN
from .plan import Plan
from .pruned import pruned_spectra
from .shard_file import write_whole
from .spectra import LayerSpectra
from .workload import Work, size_of

DOUBT = "alds_doubt.json"


def kind_of(single: bool) -> str:
    """What spectra are called in the journal."""
    return "spectra32" if single else "spectra64"


def find_spectra(work: Work, numbers: Iterable[int], single: bool) -> None:
    """The spectra of these layers, in the journal."""
    ready, settings, journal, kind = work.ready, work.settings, work.journal, kind_of(single)
    own = work.shared([i for i in numbers if not journal.has(kind, i)])
    done, total = 0, sum(size_of(ready[i]) for i in own)
    for batch in work.batches(own):
        layers = [ready[i] for i in batch]
        with work.weights(layers) as sums:
            found = pruned_spectra(
                layers, settings.schemes, settings.groups, settings.criterion, settings.align, single=single
            )
        if single != settings.single:
            check_sums(work, {i: spectra_of(work, i)[1] for i in batch}, sums)
        for number, spectra in zip(batch, found, strict=True):
            tensors = {f"{scheme}.{k}": values for (scheme, k), values in spectra.values.items()}
            notes = {"top": spectra.top, "crc32": sums[spectra.layer.name], "single": spectra.single}
            journal.put(kind, number, tensors, notes)
        done += sum(map(size_of, layers))
        work.progress("spectra" if single == settings.single else "spectra in doubt", done, total)
    work.world.together()


def check_sums(work: Work, known: Mapping[int, int], found: Mapping[str, int]) -> None:
    """FileFormatError if the CRC-32 of a weight, by number, is not what was ``found`` of it, by name."""
    for number, crc in known.items():
        name = work.ready[number].name
        if found[name] != crc:
            raise FileFormatError(
                f"layer {label(name)}: its weight has changed since it was analysed; remove "
                f"{str(work.journal.output)!r} and begin again"
            )


def spectra_of(work: Work, number: int, single: bool | None = None) -> tuple[LayerSpectra, int]:
    """The spectra of a layer out of the journal, and the CRC-32 of the weight that they are of."""
    tensors, notes = work.journal.get(kind_of(work.settings.single if single is None else single), number)
    values = {(int(k.split(".")[0]), int(k.split(".")[1])): v for k, v in tensors.items()}
    top = {int(scheme): float(value) for scheme, value in notes["top"].items()}
    found = LayerSpectra(work.ready[number], dict(sorted(values.items())), top, single=notes["single"])
    return found, int(notes["crc32"])


def find_plan(work: Work) -> Plan:
    """The plan: made by one process, read by all, who compute what it asks for in float64 meanwhile."""
    path = work.journal.folder / PLAN
    if work.world.first and not path.exists():
        found = {layer.name: spectra_of(work, i)[0] for i, layer in work.ready.items()}
        analysis = Analysis(
            tuple(work.layers), found, count_params(work.model), work.model, sharpen=lambda names: _sharpen(work, names)
        )
        s = work.settings
        plan = analysis.plan(**s.budget, criterion=s.criterion, p=s.p, align=s.align)  # type: ignore[arg-type]
        write_whole(path, [plan.to_json().encode()])
    work.world.together()
    while not path.exists():
        find_spectra(work, sorted(in_doubt(work)), single=False)
        work.world.together()
    try:
        return Plan.from_json(path.read_text())
    except (PlanError, ValueError) as e:
        raise FileFormatError(f"{str(path)!r} is damaged ({e}); remove it and run the same command again") from e


def in_doubt(work: Work) -> set[int]:
    """The layers, by number, whose float32 spectra do not decide this job's plan: those in float64 do."""
    path, what = work.journal.folder / DOUBT, _decided(work)
    if not path.exists():
        return set()
    try:
        found = json.loads(path.read_text())
        return set(map(int, found["layers"])) if found["job"] == what else set()
    except (KeyError, ValueError, TypeError) as e:
        raise FileFormatError(f"{str(path)!r} is damaged ({e}); remove {str(work.journal.output)!r}") from e


def _decided(work: Work) -> dict[str, Any]:
    """What of a job decides which layers are in doubt, and may be another when it is begun again."""
    return {name: value for name, value in work.journal.job.items() if name in LATER}


def _sharpen(work: Work, names: Sequence[str]) -> list[LayerSpectra]:
    """Spectra of these layers in float64, computed by all processes; the first one asks."""
    numbers = [i for i, layer in work.ready.items() if layer.name in names]
    known = in_doubt(work)
    if not known.issuperset(numbers):
        text = json.dumps({"job": _decided(work), "layers": sorted(known.union(numbers))})
        write_whole(work.journal.folder / DOUBT, [text.encode()])
    work.world.together()
    find_spectra(work, sorted(in_doubt(work)), single=False)
    return [spectra_of(work, i, single=False)[0] for i in numbers]
