"""What :func:`alds_fast.deploy` measured, layer by layer: printed, saved and used again."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import ArgumentError, FileFormatError, MissingFileError
from ..files import target_file, write_text
from ..measurement import STEADY
from ..text import ShownInNotebooks, shape_text, table

FORMAT = "alds_fast.deploy"
VERSION = 1
_SINGLE = re.compile(r"dense|(two-op|fused)(, groups=\d+, rank=\d+)?")
_MERGED = re.compile(r"separate|two-op|fused")


@dataclass(frozen=True)
class DeployRow:
    """One low-rank layer, or (kind "merged", names joined by " + ") several that read the same input.

    Attributes:
        name, kind, shape, structure: the layer, its dense weight's shape, its scheme, groups and rank.
        call: everything that its time depends on beside the hardware, as JSON; two layers with the same are one.
        times_ms: milliseconds in one run of the model (all calls of the layer) by candidate: "dense", "two-op", "fused"
            and reshaped forms of these two, like "two-op, groups=1, rank=24"; for merged layers "separate" (each as it
            won), "two-op" and "fused"; empty if a backend was forced.
        errors: by candidate, the relative Frobenius distance of its output from that of the factors in float64.
        won: the candidate that was kept.
        note: why the fused kernel could not run, or why nothing was measured.
        source: "measured", "table" (taken over from an earlier one) or "forced".
        members: names of the layers that are merged, empty for a single one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    structure: str
    call: str
    times_ms: dict[str, float]
    errors: dict[str, float]
    won: str
    note: str
    source: str
    members: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """How much faster than dense (merged layers: than separate) it runs as deployed; NaN if not measured."""
        baseline = self.times_ms.get("dense", self.times_ms.get("separate", math.nan))
        return baseline / self.times_ms.get(self.won, math.nan)


@dataclass(frozen=True)
class DeployTable(ShownInNotebooks):
    """All low-rank layers of a deployed model.

    Attributes:
        rows: one :class:`DeployRow` per low-rank layer.
        environment: hardware, torch version and settings that the times hold for.
        model_ms: median milliseconds of one run of the whole model: "dense" (all low-rank layers recomposed), "two-op"
            (the model as it was given, as library calls) and "deployed".
        kept: "deployed", or "two-op" or "dense" where the deployed model as a whole was slower than that.
        ratios: what decided it: by "deployed / two-op" and the like, medians of the ratios of runs side by side, which
            need not be the ratios of the medians; empty where nothing was to decide, a backend being forced or no layer
            using its factors.
        spreads: how far the quartiles of these ratios are apart, over the median.
    """

    rows: tuple[DeployRow, ...]
    environment: dict[str, Any]
    model_ms: dict[str, float] = field(default_factory=dict)
    kept: str = "deployed"
    ratios: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, float] = field(default_factory=dict)

    @property
    def decided(self) -> str:
        """In words which of the three models was kept, and why."""
        if not self.ratios:
            dense = self.rows and all(row.won in ("dense", "separate") for row in self.rows)
            return f"kept: {self.kept}" + ", every layer dense" * bool(dense)
        apart = {name: f" (quartiles {spread:.0%} apart)" for name, spread in self.spreads.items()}
        pairs = ", ".join(f"{name} {ratio:.3f}{apart.get(name, '')}" for name, ratio in self.ratios.items())
        return f"kept: {self.kept}, by the medians of paired ratios of times: {pairs}"

    @property
    def steady(self) -> bool:
        """Whether the rounds of the whole models were near enough to one another to trust what they decided."""
        return all(spread <= STEADY for spread in self.spreads.values())

    def known(self, environment: Mapping[str, Any]) -> dict[str, DeployRow]:
        """Measured rows by call, for this environment; none where it differs."""
        if json.loads(json.dumps(dict(environment))) != json.loads(json.dumps(self.environment)):
            return {}
        return {row.call: row for row in self.rows if row.times_ms}

    def __repr__(self) -> str:
        return f"<DeployTable of {len(self.rows)} layers, kept: {self.kept}; print() has them>"

    def __str__(self) -> str:
        headers = ["layer", "shape", "structure", "dense ms", "two-op ms", "fused ms", "kept", "ratio", "error", "note"]
        notes = {note: str(i) for i, note in enumerate(dict.fromkeys(row.note for row in self.rows if row.note), 1)}
        rows = [[*_cells(row), notes.get(row.note, "")] for row in self.rows]
        lines = "\n".join([table(headers, rows, left=(0, 2, 6)), *(f"note {i}: {note}" for note, i in notes.items())])
        whole = ", ".join(f"{name} {ms:.3f} ms" for name, ms in self.model_ms.items())
        return f"{lines}\n{self.environment.get('device')}: {whole or 'the model was not timed'}; {self.decided}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, as a whole or not at all; MissingFileError or ArgumentError where that is no place for it."""
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_text(target_file(path), json.dumps(data, indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DeployTable:
        """Read what :meth:`save` wrote; MissingFileError, or FileFormatError for anything else."""
        try:
            with open(path) as file:
                data = json.load(file)
            if (data["format"], data["version"]) != (FORMAT, VERSION):
                raise ValueError(f"it is {data['format']!r} version {data['version']!r}")
            rows = tuple(_row(fields) for fields in data["rows"])
            if data["kept"] not in ("dense", "two-op", "deployed"):
                raise ValueError(f"kept is {data['kept']!r}")
            decided = _times(data.get("ratios", {})), {str(k): float(v) for k, v in data.get("spreads", {}).items()}
            return cls(rows, dict(data["environment"]), _times(data["model_ms"]), data["kept"], *decided)
        except FileNotFoundError as e:
            raise MissingFileError(f"{os.fspath(path)!r} does not exist") from e
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise FileFormatError(f"{os.fspath(path)!r} is not a table that deploy saved: {e!r}") from e


def known_rows(
    table: DeployTable | str | os.PathLike[str] | None, environment: Mapping[str, Any]
) -> dict[str, DeployRow]:
    """What a table, or a saved one, knows for this environment, by call; ArgumentError for anything else."""
    if table is None:
        return {}
    if isinstance(table, str | os.PathLike):
        table = DeployTable.load(table)
    if not isinstance(table, DeployTable):
        raise ArgumentError(f"table is a {type(table).__name__}: expected a DeployTable or the path of a saved one")
    return {call: replace(row, source="table") for call, row in table.known(environment).items()}


def _times(fields: Mapping[str, Any]) -> dict[str, float]:
    times = {str(name): float(value) for name, value in fields.items()}
    if not all(0 < ms < math.inf for ms in times.values()):
        raise ValueError(f"times {times} are not all above 0")
    return times


def _row(fields: Mapping[str, Any]) -> DeployRow:
    texts = {n: fields[n] for n in ("name", "kind", "structure", "call", "won", "note", "source")}
    if not all(isinstance(v, str) for v in texts.values()):
        raise ValueError(f"not all texts: {texts}")
    times, errors = _times(fields["times_ms"]), {str(k): float(v) for k, v in fields["errors"].items()}
    if texts["won"] not in times and (times or texts["won"] not in ("dense", "two-op", "fused")):
        raise ValueError(f"{texts['won']!r} won but was not timed")
    kinds = _MERGED if texts["kind"] == "merged" else _SINGLE
    if bad := [name for name in times if not kinds.fullmatch(name)]:
        raise ValueError(f"{bad[0]!r} is no way to run a {texts['kind']}")
    members = tuple(str(name) for name in fields["members"])
    return DeployRow(
        **texts, members=members, shape=tuple(int(n) for n in fields["shape"]), times_ms=times, errors=errors
    )


def _cells(row: DeployRow) -> list[str]:
    def best(kind: str) -> str:
        of_kind = [ms for name, ms in row.times_ms.items() if name.split(",")[0] == kind]
        return f"{min(of_kind):.3f}" if of_kind else "-"

    ratio = "-" if math.isnan(row.ratio) else f"{row.ratio:.2f}"
    error = f"{row.errors[row.won]:.1e}" if row.won in row.errors else "-"
    times = [best(kind) for kind in ("dense", "two-op", "fused")]
    return [row.name or "(model)", shape_text(row.shape), row.structure, *times, row.won, ratio, error]
