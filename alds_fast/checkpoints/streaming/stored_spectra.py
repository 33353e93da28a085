"""Spectra in the journal: how they are named, read and found to be in doubt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...criteria import Key, LayerSpectra, mark_float32
from ...errors import FileFormatError
from ...layers import label
from .journal import LATER
from .streamed_model import Work

DOUBT = "alds_doubt.json"


def kind_of(float32: bool) -> str:
    """What the spectra of a layer are called in the journal."""
    return "spectra32" if float32 else "spectra64"


def _exact(key: Key) -> str:
    """What a layer's float64 spectrum of (scheme, groups) is called in the journal."""
    return f"exact.{key[0]}.{key[1]}"


def check_sums(work: Work, known: Mapping[int, int], sums: Mapping[str, int]) -> None:
    """FileFormatError if the CRC-32 of a weight, ``known`` by number, is not that in ``sums``, by name."""
    for number, crc in known.items():
        name = work.ready[number].name
        if sums[name] != crc:
            raise FileFormatError(
                f"layer {label(name)}: its weight has changed since it was analysed; remove "
                f"{str(work.journal.output)!r} and begin again"
            )


def spectra_of(work: Work, number: int) -> tuple[LayerSpectra, int]:
    """The spectra of a layer out of the journal, and the CRC-32 of the weight that they are of."""
    tensors, notes = work.journal.get(kind_of(work.settings.float32_first), number)
    values = {(int(k.split(".")[0]), int(k.split(".")[1])): v for k, v in tensors.items()}
    top = {int(scheme): float(value) for scheme, value in notes["top"].items()}
    spectra = LayerSpectra(work.ready[number], dict(sorted(values.items())), top)
    return mark_float32(spectra) if notes["single"] else spectra, int(notes["crc32"])


def exact_values(work: Work, number: int, key: Key) -> Tensor:
    """The float64 spectrum of a layer that was in doubt."""
    return work.journal.get(_exact(key), number)[0]["values"]


def in_doubt(work: Work) -> set[tuple[int, Key]]:
    """The float32 spectra, by the layer's number, that do not decide this job's plan: those in float64 do."""
    path, what = work.journal.folder / DOUBT, _deciding_settings(work)
    if not path.exists():
        return set()
    try:
        content = json.loads(path.read_text())
        spectra = content["spectra"] if content["job"] == what else ()
        return {(int(i), (int(scheme), int(k))) for i, scheme, k in spectra}
    except (KeyError, ValueError, TypeError) as e:
        raise FileFormatError(f"{str(path)!r} is damaged ({e}); remove {str(work.journal.output)!r}") from e


def _deciding_settings(work: Work) -> dict[str, Any]:
    """What of a job decides which spectra are in doubt, and may be another when it is begun again."""
    return {name: value for name, value in work.journal.job.items() if name in LATER}
