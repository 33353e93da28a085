"""Compress a checkpoint directory in the layout of Hugging Face, which need not fit in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...checks import is_count
from ...criteria import DEFAULT_CRITERION, WEIGHT_CRITERIA
from ...errors import ArgumentError, FileFormatError
from ...factors import FactorReport
from ...layers import patterns
from ...linalg import SCHEMES
from ...planning import (
    Plan,
    Progress,
    check_groups,
    check_plan_options,
    check_schemes,
    is_float32,
    resolved_norm,
    tell_nobody,
)
from ...version import __version__
from ..safetensors_reader import CONFIG, Shards, Stored, open_shards
from .factors_and_files import FACTORS, compress_streamed
from .journal import JOB, PLAN, Journal
from .output_files import companions
from .processes import join_processes, own_device
from .source_checksums import check_unchanged
from .streamed_model import Settings, Work


@dataclass(frozen=True)
class CompressedCheckpoint:
    """A compressed checkpoint directory: where it is, its plan, and how each layer's factors were computed, by name."""

    folder: Path
    plan: Plan
    factors: dict[str, FactorReport]


def _settings(
    params: float | None, error: float | None, criterion: str, p: float | None, align: int, schemes: Sequence[int],
    groups: str | Sequence[int], include: Any, exclude: Any, max_shard_bytes: int, precision: str,
    pivots: bool,
) -> Settings:  # fmt: skip
    """The arguments, checked before anything is read or written."""
    check_plan_options({"params": params}, error, None, criterion=criterion, p=p, align=align, pivots=pivots)
    if criterion not in WEIGHT_CRITERIA:
        raise ArgumentError(
            f"criterion={criterion!r} needs data, which is not collected from checkpoint directories; choose from "
            f"{', '.join(WEIGHT_CRITERIA)}, or load the model and use analyze(data=)"
        )
    named = None if isinstance(groups, str) and groups == "auto" else check_groups(groups)
    if not is_count(max_shard_bytes):
        raise ArgumentError(f"max_shard_bytes={max_shard_bytes!r} is not a positive number of bytes")
    budget = {name: float(v) for name, v in (("params", params), ("error", error)) if v is not None}
    return Settings(
        budget, criterion, float(resolved_norm(p, criterion, {"params": params}, "alds")), int(align),
        check_schemes(schemes), named if named is None or isinstance(named, str) else tuple(map(int, named)),
        patterns(include, "include"), patterns(exclude, "exclude"), max_shard_bytes, pivots, is_float32(precision),
    )  # fmt: skip


def compress_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    params: float | None = None,
    error: float | None = None,
    criterion: str = DEFAULT_CRITERION,
    p: float | None = None,
    align: int = 1,
    schemes: Sequence[int] = SCHEMES,
    groups: str | Sequence[int] = "auto",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    precision: str = "float32",
    device: str = "cpu",
    progress: Progress | None = None,
    pivots: bool = True,
) -> CompressedCheckpoint:
    """Compress a checkpoint directory into another one, with no more than a few layers in memory.

    Args:
        source: a directory with config.json, whose architecture transformers knows, and safetensors files; only read.
        output: a new directory. It gets the compressed shards, their index, config.json, the plan
            (``alds_plan.json``), how the factors were computed (``alds_factors.json``), and copies of all other files
            (tokenizer, ...). Load it with :func:`alds_fast.from_pretrained`.
        params, error, criterion, p, align, pivots: as for :meth:`alds_fast.Analysis.plan`, criteria without data.
        schemes, include, exclude: as for :func:`alds_fast.analyze`.
        groups: numbers of channel slices to try; "auto" for divisors of the channels up to 16, "divisors" for all.
        max_shard_bytes: most bytes of a file, unless one tensor alone is larger.
        precision: "float64", or "float32" for spectra in float32 where the plan can be checked to be the same, see
            :meth:`alds_fast.Analysis.plan`: under params= by the criterion "frobenius".
        device: where it is computed, "cpu" or "cuda" (the GPU of LOCAL_RANK).
        progress: told (what, done, total) as the work goes on, in each process.

    A job that was interrupted, at any moment and in any way, goes on when it is started again with the same arguments;
    the result is the same to the byte, also for any number of threads and of processes. Started by torchrun, all
    processes work on it together; they must see the same directories.

    Raises:
        BudgetError, ArgumentError: an argument is out of range; the output directory holds something else, or another
            process is at work in it; the checkpoint is compressed already.
        MissingFileError, FileFormatError: a file of the checkpoint is missing, truncated, corrupt or of another model.
        WeightError: a weight is NaN or infinite.
        FileWriteError: the output cannot be written; what was finished is kept.
        DependencyError, ModelError: transformers is not installed, or does not know the architecture.
        WorkerError: another process of the job failed.
    """
    settings = _settings(
        params, error, criterion, p, align, schemes, groups, include, exclude, max_shard_bytes, precision, pivots
    )
    source, output = _folders(source, output)
    place, shards = own_device(device), open_shards(source)
    journal = Journal(output, _job(shards, settings))
    _run(shards, settings, place, journal, progress or tell_nobody)
    return _result(output)


def _folders(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Both directories; ArgumentError if one is no name, or the output lies in the source."""
    for name, value in (("source", source), ("output", output)):
        if not isinstance(value, str | os.PathLike):
            raise ArgumentError(f"{name} is a {type(value).__name__}: expected the name of a directory")
    if Path(output).resolve().is_relative_to(Path(source).resolve()):
        raise ArgumentError(
            f"the output {os.fspath(output)!r} is the checkpoint itself or in it; name another directory"
        )
    return Path(source), Path(output)


def _job(shards: Shards, settings: Settings) -> dict[str, Any]:
    """What decides the output, of JSON's types: the input's checksums, the settings, and the library's version."""
    others = {name: Stored(path, "U8", (), 0, path.stat().st_size).crc32()
              for name, path in companions(shards.folder, {CONFIG, PLAN, FACTORS, JOB}).items()}  # fmt: skip
    job = {"format": "alds_fast.job", "alds_fast": __version__, "checkpoint": shards.fingerprint, "others": others}
    fields: dict[str, Any] = json.loads(json.dumps({**job, **asdict(settings)}))
    return fields


def _run(shards: Shards, settings: Settings, place: torch.device, journal: Journal, progress: Progress) -> None:
    """Do what is not finished yet, together with the job's other processes."""
    with join_processes() as world, ExitStack() as stack:
        finished = journal.check()
        work = None if finished else Work(shards, settings, world, place, journal, progress)
        if world.first and not finished:
            stack.enter_context(journal.lock())
            journal.begin()
        world.together()
        if work is not None:
            compress_streamed(work)
        elif world.first:
            check_unchanged(shards, journal)
            journal.clean()
        world.together()


def _result(output: Path) -> CompressedCheckpoint:
    """What a finished directory holds; FileFormatError if it is damaged."""
    try:
        reports = json.loads((output / FACTORS).read_text())
        factors = {name: FactorReport(**fields) for name, fields in reports.items()}
        return CompressedCheckpoint(output, Plan.from_json((output / PLAN).read_text()), factors)
    except (OSError, ValueError, TypeError) as e:
        raise FileFormatError(f"{str(output)!r} is damaged ({e}); remove it and begin again") from e
