"""Compress a checkpoint directory a few layers at a time, in one process or several, resumable at any moment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from ...errors import FileFormatError, FileWriteError
from ...factors import Choice, plain_layers
from ...files import crc32, whole_or_nothing, write_whole
from ...integrations import layer_fields, quantization_config
from ...layers import filters_first
from ...planning import Plan
from ...text import size_text
from ..pretrained import PLAN
from ..safetensors_reader import CONFIG, DTYPES, INDEX, Stored, stored_in
from ..safetensors_writer import Entry, header, write_shard
from ..with_data import WithData
from .journal import JOB, Journal, changed_tensors
from .output_files import NarrowDense, OutputFile, Replacement, companions, index_of, output_files
from .source_checksums import check_crc32, read_record, record_checksums
from .spectra_and_plan import find_plan, find_spectra
from .stored_spectra import check_sums, exact_values, in_doubt, kind_of, spectra_of
from .streamed_model import Work

FACTORS = "alds_factors.json"


def find_factors(
    work: Work, plan: Plan, files: Sequence[OutputFile], choices: Mapping[int, Replacement],
    seen: WithData | None,
) -> None:  # fmt: skip
    """The factors of all layers that are factorised and not in a finished file, in the journal."""
    journal = work.journal
    missing = files_to_write(journal, files)
    wanted = [part.layer for file in missing for part in file.parts if part.layer is not None]
    todo = [i for i in wanted if not (journal.has("factors", i) and journal.has("report", i))]
    _check_room(work, missing, todo)
    if seen is not None:
        if todo:
            seen.find_factors(plan, choices, todo)
        return
    for batch in work.in_batches("factors", todo):
        _factorise(work, plan, {i: c for i in batch if isinstance(c := choices[i], Choice)})


def _check_room(work: Work, missing: Sequence[OutputFile], todo: Sequence[int]) -> None:
    factors = sum(part.size for file in missing for part in file.parts if part.layer in todo)
    need, free = sum(file.size for file in missing) + factors, shutil.disk_usage(work.journal.output).free
    if free < need:
        raise FileWriteError(
            f"{str(work.journal.output)!r}: {size_text(need)} are still to be written there, {size_text(free)} are "
            f"free; what was finished is kept: free some space and run the same command again"
        )


def _factorise(work: Work, plan: Plan, choices: Mapping[int, Choice]) -> None:
    layers, doubt = {i: work.ready[i] for i in choices}, in_doubt(work)
    known = {i: spectra_of(work, i) for i in choices}
    numbers = {layer.name: i for i, layer in layers.items()}
    keys = {i: choice.decomposition.fold for i, choice in choices.items()}
    spectra = {s.layer.name: exact_values(work, i, keys[i]) if (i, keys[i]) in doubt else s.values[keys[i]]
               for i, (s, _) in known.items()}  # fmt: skip
    with work.weights(layers.values()) as sums:
        check_sums(work, {i: crc for i, (_, crc) in known.items()}, sums)
        limit = sum(layer.shape.numel for layer in layers.values())
        chosen = [(choices[i], layers[i]) for i in choices]
        for choice, low, report in plain_layers(chosen, spectra, plan.exact, limit, plan.keeps_constants):
            number = numbers[choice.name]
            dtype = DTYPES[work.shards.tensors[work.sources[choice.name]].dtype]
            tensors = {name: getattr(low, name).detach().to("cpu", dtype) for name in ("encoder", "decoder")}
            tensors |= {"order": low.order.cpu()} if low.pivots else {}
            fields = {"method": report.method, "iterations": report.iterations, "error": report.error}
            fields |= {f"crc32.{name}": crc32(tensor) for name, tensor in tensors.items()}
            if not work.journal.has("report", number):
                work.journal.put("report", number, {}, fields)
            work.journal.put("factors", number, tensors, {})


def stored_sizes(module: nn.Module, shape: Sequence[int]) -> tuple[int, ...]:
    """The sizes of a weight of that shape, (outputs, inputs), as a layer like the module stores it."""
    return tuple(filters_first(module, torch.empty(list(shape), device="meta")).shape)


def sizes_left(work: Work, plan: Plan) -> dict[str, dict[str, list[int]]]:
    """By layer that loses hidden units, what :func:`alds_fast.layers.narrowed_sizes` says of such."""
    layers = {layer.name: layer for layer in work.layers}
    return {name: sizes for units in plan.hidden_units for name, sizes in units.sizes(layers).items()}


def write_files(work: Work, files: Sequence[OutputFile]) -> None:
    """The output's safetensors files, each whole or not there; the factors in them leave the journal."""
    journal = work.journal
    missing = files_to_write(journal, files)
    work.world.together()
    share = work.world.share(missing, lambda file: float(file.size))
    for number, file in enumerate(share, 1):
        _write_file(work, file)
        work.progress("files", number, len(share))
    work.world.together()


def _write_file(work: Work, file: OutputFile) -> None:
    journal, parts = work.journal, {entry.name: part for part in file.parts for entry in part.entries}
    analysed = work.ready if work.settings.data is None else {}
    numbers = {work.sources[layer.name]: i for i, layer in analysed.items()}
    passing, changed = read_record(journal), changed_tensors(journal)

    def content(entry: Entry) -> Iterator[bytes]:
        part = parts[entry.name]
        if entry.name == part.mark:
            return iter([bytes(entry.size)])  # the mark
        if part.layer is not None:
            return _factor(journal, part.layer, entry)
        if part.source in changed:
            stored, crc = changed[part.source]
            return check_crc32(stored.chunks(), crc, f"{str(stored.file)!r} is damaged; remove it and begin again")
        number = numbers.get(part.source)
        crc = passing[part.source] if number is None else spectra_of(work, number)[1]
        other = f"the tensor {part.source!r} has changed since this job began; remove {str(journal.output)!r}"
        return check_crc32(work.shards.tensors[part.source].chunks(), crc, other)

    write_shard(journal.output / file.name, file.entries, content)
    for part in file.parts:
        if part.layer is not None:
            journal.drop("factors", part.layer)


def _factor(journal: Journal, layer: int, entry: Entry) -> Iterator[bytes]:
    """A factor's bytes out of the journal."""
    path, name = journal.path("factors", layer), entry.name.rpartition(".")[2]
    damaged = f"{str(path)!r} is damaged; remove it and run the same command again"
    try:
        stored = stored_in(path)[name]
    except (FileFormatError, KeyError) as e:
        raise FileFormatError(damaged) from e
    if (stored.dtype, stored.shape) != (entry.dtype, entry.shape):
        raise FileFormatError(damaged)
    return check_crc32(stored.chunks(), int(journal.get("report", layer)[1][f"crc32.{name}"]), damaged)


def files_to_write(journal: Journal, files: Sequence[OutputFile]) -> list[OutputFile]:
    """The output's safetensors files that are not there, or not of their size."""
    sizes = {f.name: len(header(f.entries, {})) + f.size for f in files}
    paths = {f.name: journal.output / f.name for f in files}
    return [f for f in files if not (paths[f.name].is_file() and paths[f.name].stat().st_size == sizes[f.name])]


def write_rest(work: Work, plan: Plan, files: Sequence[OutputFile], choices: Mapping[int, Replacement]) -> None:
    """Index, config, plan and everything else of the input directory; then the job is finished."""
    journal = work.journal
    kept = ("method", "iterations", "error")
    reports = {c.name: {k: journal.get("report", i)[1][k] for k in kept} for i, c in choices.items()}
    layers = {work.sources[c.name].removesuffix(".weight"): layer_fields(c.decomposition, c.shape)
              for c in choices.values() if isinstance(c, Choice)}  # fmt: skip
    narrowed = {work.sources[name].removesuffix(".weight"): sizes for name, sizes in sizes_left(work, plan).items()}
    config = {**work.shards.config, "quantization_config": quantization_config(layers, narrowed=narrowed)}
    texts = {CONFIG: json.dumps(config, indent=2), PLAN: plan.to_json(), FACTORS: json.dumps(reports, indent=1)}
    if len(files) > 1:
        texts[INDEX] = json.dumps(index_of(list(files)), indent=2)
    content: dict[str, Iterable[bytes]] = {name: [text.encode() + b"\n"] for name, text in texts.items()}
    for name, path in companions(work.shards.folder, {*texts, JOB}).items():
        content[name] = Stored(path, "U8", (), 0, path.stat().st_size).chunks()
    for name, pieces in content.items():
        if not (journal.output / name).exists():
            with whole_or_nothing(journal.output / name):
                (journal.output / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(journal.output / name, pieces)
    analysed = work.ready if work.settings.data is None else {}
    sums = {work.sources[layer.name]: spectra_of(work, i)[1] for i, layer in analysed.items()}
    journal.finish({**read_record(journal), **sums})


def compress_streamed(work: Work, seen: WithData | None = None) -> None:
    """All of it, by what layers see where that is given; what is there already is not done again."""
    numbers = {layer.name: i for i, layer in work.ready.items()}
    if work.world.first:
        weights = {work.sources[name] for name in numbers} if seen is None else set()
        analysed = [i for i in work.ready if work.journal.has(kind_of(work.settings.float32_first), i)]
        known = {work.sources[work.ready[i].name]: spectra_of(work, i)[1] for i in analysed}
        record_checksums(
            work.shards, work.journal, [name for name in work.shards.tensors if name not in weights], known
        )
    work.world.together()
    if seen is None:
        find_spectra(work)
    plan = find_plan(work) if seen is None else seen.find_plan()
    left = sizes_left(work, plan)
    choices: dict[int, Replacement] = {
        numbers[name]: NarrowDense(name, stored_sizes(work.ready[numbers[name]].module, of["shape"]))
        for name, of in left.items()
    }
    choices |= {numbers[row.name]: row.choice for row in plan.layers if row.choice is not None}
    stored = {work.sources[choice.name]: (i, choice) for i, choice in choices.items()}
    biases = {work.names[bias]: of["shape"][0] for name, of in left.items() if (bias := f"{name}.bias") in work.names}
    files = output_files(work.shards, stored, work.settings.max_shard_bytes, biases)
    find_factors(work, plan, files, choices, seen)
    write_files(work, files)
    if work.world.first:
        write_rest(work, plan, files, choices)
    work.world.together()
