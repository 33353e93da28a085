"""Compress a checkpoint directory in the layout of Hugging Face, which need not fit in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...blocks import check_lists
from ...checks import explaining, is_count
from ...criteria import DEFAULT_CRITERION, WEIGHT_CRITERIA
from ...errors import ArgumentError, FileFormatError
from ...factors import FactorReport, check_schedule, passes_of
from ...linalg import SCHEMES
from ...measurement import Sensitivity, check_data, check_sensitivity
from ...planning import (
    Plan,
    budget_amount,
    check_groups,
    check_needs,
    check_plan_options,
    check_schemes,
    is_float32,
    read_pins,
    resolved_norm,
)
from ...processes import join_processes, own_device
from ...progress import Progress, ProgressOption, telling
from ...selection import Selection, patterns
from ...version import __version__
from ..pretrained import PLAN
from ..safetensors_reader import CONFIG, Shards, Stored, open_shards
from ..with_data import WithData
from .factors_and_files import FACTORS, compress_streamed
from .journal import JOB, Journal
from .output_files import companions
from .source_checksums import batches_digest, check_unchanged, sensitivity_text
from .streamed_model import Settings, Work

ONE_SLICE = (1,)  # what groups="auto" stands for with data
_RUN = (
    "budgets are params=, memory= or error=; flops=, latency= and quality= need runs of the whole model: load it with "
    "transformers, then compress(model, ...)"
)


@dataclass(frozen=True)
class CompressedCheckpoint:
    """A compressed checkpoint directory: where it is, its plan, and how each layer's factors were computed, by name."""

    folder: Path
    plan: Plan
    factors: dict[str, FactorReport]

    def __repr__(self) -> str:
        return f"<CompressedCheckpoint in {str(self.folder)!r}, {len(self.factors)} low-rank layers: {self.plan!r}>"


def _settings(
    params: float | None, error: float | None, criterion: str | None, p: float | None, align: int,
    schemes: Sequence[int], groups: str | Sequence[int], include: Any, exclude: Any, max_shard_bytes: int,
    precision: str, pivots: bool, data: Any, sensitivity: Sensitivity, refit: bool, refine: bool | int,
    blocks: str | Sequence[str] | None, memory: float | str | None, pins: Mapping[Any, Any] | None, min_rank: int,
    hidden_units: bool,
) -> Settings:  # fmt: skip
    """The arguments, checked before anything is read or written."""
    shares: dict[str, Any] = {"params": params, "memory": memory}
    options: dict[str, Any] = {"criterion": criterion, "p": p, "align": align, "pivots": pivots}
    check_plan_options(shares, error, None, **options, pins=pins, min_rank=min_rank, hidden_units=hidden_units)
    check_sensitivity(sensitivity)
    passes, lists = passes_of(refine), check_lists(blocks)
    wanted = {"sensitivity=": sensitivity, "refit=": refit, "refine=": refine, "blocks=": lists}
    asked = [name for name, value in wanted.items() if value]
    if data is None and (criterion not in (None, *WEIGHT_CRITERIA) or asked):
        what = asked[0] if asked else f"criterion={criterion!r}"
        raise ArgumentError(f"{what} needs data=, batches of the model's inputs; criteria without data are "
                            f"{', '.join(WEIGHT_CRITERIA)}")  # fmt: skip
    if hidden_units:
        check_needs(criterion, "alds", data is not None, bool(sensitivity), hidden_units)
    criterion = DEFAULT_CRITERION if data is None and criterion is None else criterion
    named = None if isinstance(groups, str) and groups == "auto" else check_groups(groups)
    named = ONE_SLICE if named is None and data is not None else named
    if not is_count(max_shard_bytes):
        raise ArgumentError(f"max_shard_bytes={max_shard_bytes!r} is not a positive number of bytes")
    budget = {name: budget_amount(v) for name, v in {**shares, "error": error}.items() if v is not None}
    norm = p if criterion is None else float(resolved_norm(p, criterion, shares, "alds"))
    asked_of_data: tuple[Any, ...] = bool(refit), passes or None, lists, hidden_units or None
    seen = () if data is None else (batches_digest(data), sensitivity_text(sensitivity), *asked_of_data)
    return Settings(
        budget, criterion, norm, int(align),
        check_schemes(schemes), named if named is None or isinstance(named, str) else tuple(map(int, named)),
        patterns(include, "include"), patterns(exclude, "exclude"), max_shard_bytes, pivots, is_float32(precision),
        read_pins(pins) or None, min_rank if min_rank > 1 else None, *seen,
    )  # fmt: skip


@explaining(**dict.fromkeys(("flops", "latency", "quality"), _RUN))
def compress_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    params: float | None = None,
    error: float | None = None,
    criterion: str | None = None,
    p: float | None = None,
    align: int = 1,
    schemes: Sequence[int] = SCHEMES,
    groups: str | Sequence[int] = "auto",
    include: Selection = None,
    exclude: Selection = None,
    max_shard_bytes: int = 5 * 10**9,
    precision: str = "float32",
    device: str = "cpu",
    progress: ProgressOption = None,
    pivots: bool = True,
    data: Iterable[Any] | None = None,
    sensitivity: Sensitivity = False,
    refit: bool = False,
    refine: bool | int = False,
    blocks: str | Sequence[str] | None = None,
    memory: float | str | None = None,
    pins: Mapping[Any, Any] | None = None,
    min_rank: int = 1,
    hidden_units: bool = False,
) -> CompressedCheckpoint:
    """Compress a checkpoint directory into another one, with a few layers, or with ``data`` one block, in memory.

    Args:
        source: a directory with config.json, whose architecture transformers knows, and safetensors files; only read.
        output: a new directory. It gets the compressed shards, their index, config.json, the plan
            (``alds_plan.json``), how the factors were computed (``alds_factors.json``), and copies of all other files
            (tokenizer, ...). Load it with :func:`alds_fast.from_pretrained`.
        params, memory, error, criterion, p, align, pivots, pins, min_rank, hidden_units: as for
            :meth:`alds_fast.Analysis.plan`; memory is that of the parameters as they are stored. Biases stay as they
            are, but for those of hidden units that are removed.
        schemes, include, exclude: as for :func:`alds_fast.analyze`.
        groups: numbers of channel slices to try; "auto" for divisors of the channels up to 16, with data for one,
            "divisors" for all.
        max_shard_bytes: most bytes of a file, unless one tensor alone is larger.
        precision: "float64", or "float32" for spectra in float32 where the plan can be checked to be the same, see
            :meth:`alds_fast.Analysis.plan`: under params= by the criterion "frobenius".
        device: where it is computed, "cpu" or "cuda" (the GPU of LOCAL_RANK). With data, of the models one block at a
            time is on a GPU, and errors and factors are computed on the CPU.
        progress: as for :func:`alds_fast.analyze`, in each process.
        data: batches of the model's inputs, dicts of ``input_ids`` for one, as for :func:`alds_fast.analyze`. The dense
            model is run block by block, its weights mapped out of the files; moments and what the blocks return lie in
            the journal (docs/checkpoints.md). Language models are useless without: compressed by their weights alone
            they foretell nothing.
        sensitivity: with data, also collect gradients, as for :func:`alds_fast.analyze`; "kl" for language models.
        refit: with data, fit the factors to it layer after layer, see :meth:`alds_fast.Plan.apply`.
        refine: with data, in the end train block after block, with that many passes over the data, to return what the
            dense model's return, see :func:`alds_fast.refine`. Half types are trained in float32.
        blocks: with data, names of the lists that hold the model's blocks, "model.layers" for one, where these are not
            found; several as a sequence or with commas. ArgumentError if they are no chain.

    A job that was interrupted, at any moment and in any way, goes on when it is started again with the same arguments;
    the result is the same to the byte, also for any number of threads and of processes. (With data for the same number
    of threads and processes, for others but for rounding.) Started by torchrun, all processes work on it together; they
    must see the same directories, and be given the same batches, which they share, one for each at least. Refinement is
    the first one's work, for which the others wait.

    Raises:
        BudgetError, ArgumentError: an argument is out of range; the output directory holds something else, or another
            process is at work in it; the checkpoint is compressed already.
        MissingFileError, FileFormatError: a file of the checkpoint is missing, truncated, corrupt or of another model.
        WeightError: a weight is NaN or infinite.
        FileWriteError: the output cannot be written; what was finished is kept.
        DependencyError, ModelError: transformers is not installed, or does not know the architecture; several processes
            have data, and the model is no chain of blocks.
        WorkerError: another process of the job failed.
    """
    if data is not None:
        check_data(data)
        data = list(data)
        if not data:
            raise ArgumentError("data= has no batches; an iterator can be used once only")
    settings = _settings(
        params, error, criterion, p, align, schemes, groups, include, exclude, max_shard_bytes, precision, pivots,
        data, sensitivity, refit, refine, blocks, memory, pins, min_rank, hidden_units,
    )  # fmt: skip
    if refine:
        check_schedule(data, "refine=", settings.refine)
    source, output = _folders(source, output)
    place, shards = own_device(device), open_shards(source)
    journal = Journal(output, _job(shards, settings))
    with telling(progress) as tell:
        _run(shards, settings, place, journal, tell, data, sensitivity)
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
    kind = "memory" if "memory" in settings.budget else None  # spectra for params= lack some that it needs
    fields: dict[str, Any] = json.loads(json.dumps({**job, "budget of": kind, **asdict(settings)}))
    optional = "data", "sensitivity", "refit", "refine", "blocks", "pins", "min_rank", "hidden_units", "budget of"
    return {k: v for k, v in fields.items() if v is not None or k not in optional}


def _run(
    shards: Shards, settings: Settings, place: torch.device, journal: Journal, progress: Progress,
    batches: Sequence[Any] | None, sensitivity: Sensitivity,
) -> None:  # fmt: skip
    """Do what is not finished yet, together with the job's other processes."""
    with join_processes(place) as world, ExitStack() as stack:
        journal.check_same(world.tell(journal.job))
        finished = journal.check()
        work = None if finished else Work(shards, settings, world, place, journal, progress)
        if world.first and not finished:
            stack.enter_context(journal.lock())
            journal.begin()
        world.together()
        if work is not None:
            seen = None if batches is None else WithData(work, batches, sensitivity)
            compress_streamed(work, seen)
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
