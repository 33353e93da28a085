"""Analyses in files: ``save_analysis`` and ``load_analysis``, one safetensors file, no pickle.

The spectra, the moments and what was worked out of them are tensors, written and read one at a time; the rest is JSON
in the header's metadata, with a CRC-32 of every tensor and of itself.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_model
from ..criteria import Basis, LayerSpectra, Moments, is_spectrum_of
from ..errors import ArgumentError, FileFormatError, ModelError
from ..files import crc32, replacing
from ..layers import (
    DecomposableLayer,
    Layer,
    count_params,
    decomposable,
    find_layers,
    has_plain_memory,
    is_freed,
    label,
    opened_for,
)
from ..measurement import device_of
from ..planning import Analysis
from .file_format import ANALYSIS, read_metadata
from .safetensors_reader import CODES, stored_in
from .safetensors_writer import Entry, pieces
from .save_load import model_file
from .stored_values import Read, batch_from_json, batch_to_json, tensors_of_moments

VERSION = 1
_AGAIN = "load the weights that were analysed, or analyze the model again"


def save_analysis(analysis: Analysis, path: str | os.PathLike[str]) -> None:
    """Write an analysis as one safetensors file, atomically: a killed save leaves the old file whole.

    It holds spectra, moments, the errors that are known, and CRC-32s of the weights they are of, but no weights. It
    is about as large as the moments: 8 n^2 bytes for a layer of n inputs and, with gradients, 8 f^2 for its f filters.

    Raises:
        ArgumentError: no Analysis; a name that ends as pickled files do; or the batch that the analysis keeps has
            values that no file can hold.
        ModelError: the weight of a layer has changed since it was analysed.
        MissingFileError, FileWriteError: the directory does not exist; the file cannot be written.
    """
    if not isinstance(analysis, Analysis):
        raise ArgumentError(f"analysis is a {type(analysis).__name__}: pass what analyze(model) returns")
    for name, s in analysis.spectra.items():
        if not is_spectrum_of(s.layer, next(iter(s.values.values()))):
            raise ModelError(f"layer {label(name)}: its weight has changed since it was analysed; {_AGAIN}")
    target, tensors = model_file(path), dict[str, Tensor]()
    notes = json.dumps(_notes(analysis, tensors))
    sums = json.dumps({name: crc32(tensor) for name, tensor in tensors.items()})
    metadata = {"format": ANALYSIS, "version": str(VERSION), "analysis": notes, "crc32": sums}
    metadata["analysis_crc32"] = str(zlib.crc32(f"{notes}{sums}".encode()))
    entries = [_entry(name, tensor) for name, tensor in tensors.items()]
    with replacing(target) as temporary, open(temporary, "wb") as file:
        for piece in pieces(entries, lambda entry: _bytes(tensors[entry.name]), metadata):
            file.write(piece)


def load_analysis(path: str | os.PathLike[str], model: nn.Module) -> Analysis:
    """Read an analysis of this very model: plans come out bit-equal to those of the analysis that was saved.

    Args:
        path: a file written by :func:`save_analysis`.
        model: the model that was analysed, on any device; it is not changed.

    Raises:
        MissingFileError, FileFormatError: no such file; truncated, damaged, of another format or a newer version.
        ModelError: the model has other layers or weights than the one that was analysed; with data, buffers too.

    >>> import tempfile, torch, alds_fast as alds
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_analysis(alds.analyze(model), f"{folder}/analysis.safetensors")
    ...     loaded = load_analysis(f"{folder}/analysis.safetensors", model)
    >>> loaded.plan(params=0.5) == alds.analyze(model).plan(params=0.5)
    True
    """
    metadata = read_metadata(path, ANALYSIS, VERSION)
    check_model(model)
    stored, name = stored_in(Path(path)), os.fspath(path)
    try:
        whole = f"{metadata['analysis']}{metadata['crc32']}".encode()
        if zlib.crc32(whole) != int(metadata["analysis_crc32"]):
            raise ValueError("its CRC-32 differs")
        notes, sums = json.loads(metadata["analysis"]), json.loads(metadata["crc32"])
        missing = sums.keys() ^ stored.keys()
        if missing:
            raise ValueError(f"tensor {min(missing)!r} is in the metadata or in the file alone")
    except (KeyError, ValueError) as e:
        raise FileFormatError(f"{name!r} has damaged metadata ({e}); save the analysis again") from e
    kept: dict[str, Tensor] = {}

    def read(tensor: str) -> Tensor:
        if tensor not in kept:  # layers may share a moment
            kept[tensor] = stored[tensor].tensor()
            if crc32(kept[tensor]) != sums[tensor]:
                raise FileFormatError(
                    f"{name!r}: tensor {tensor!r} is damaged (CRC-32 differs); save the analysis again"
                )
        return kept[tensor]

    return _analysis(notes, model, read)


def _notes(analysis: Analysis, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """All of an analysis but its tensors, which are put in ``tensors`` by name."""
    layers = [{n: v for n, v in vars(layer).items() if n not in ("module", "shape")} for layer in analysis.layers]
    spectra = {name: _of_spectra(name, s, tensors) for name, s in analysis.spectra.items()}
    seen, moments = tensors_of_moments(analysis.moments, ("gradient",), ("gradient_noise",))
    tensors |= {f"moments.{name}": tensor for name, tensor in seen.items()}
    bases = []
    for number, basis in enumerate(analysis._bases.values()):
        errors = []
        for i, (key, values) in enumerate(basis.known.items()):
            tensors[place := f"errors.{number}.{i}"] = values
            errors.append([*key, place])
        bases.append({"criterion": basis.criterion, "bias_correction": basis.bias_correction, "errors": errors})
    return {
        "params": analysis.params, "max_groups": analysis.max_groups, "layers": layers, "spectra": spectra,
        "moments": moments, "bases": bases, "inputs": batch_to_json(analysis.inputs, tensors),
        "weights": _digests(analysis.model, analysis.layers, bool(moments)),
    }  # fmt: skip


def _analysis(notes: Mapping[str, Any], model: nn.Module, read: Read) -> Analysis:
    """The analysis out of its notes and tensors; ModelError if the model is another one."""
    params = count_params(model)
    if params != notes["params"]:
        raise ModelError(f"the analysis is of {notes['params']:,} parameters, the model has {params:,}; {_AGAIN}")
    places = dict(model.named_modules(remove_duplicate=False))
    rows = {row["name"]: row for row in notes["layers"]}
    model = opened_for(model, [name for name, row in rows.items() if row["reason"] is None or name not in places])
    layers = _layers(model, rows)
    _check_digests(notes["weights"], _digests(model, layers, bool(notes["moments"])))
    spectra = {x.name: _spectra(x, notes["spectra"][x.name], read) for x in decomposable(layers)}
    moments = {name: _moments(note, read) for name, note in notes["moments"].items()}
    bases = {}
    for basis in notes["bases"]:
        key = basis["criterion"], basis["bias_correction"]
        bases[key] = Basis(key[0], moments, key[1])
        bases[key].known.update({(*of,): read(place) for *of, place in basis["errors"]})
    inputs = batch_from_json(notes["inputs"], read, device_of(model))
    common = {"moments": moments, "max_groups": notes["max_groups"], "inputs": inputs}
    return Analysis(tuple(layers), spectra, params, model, **common, _bases=bases)


def _layers(model: nn.Module, rows: Mapping[str, Mapping[str, Any]]) -> list[Layer]:
    """The model's layers, left out for the reasons that the analysis had."""
    layers = find_layers(model)
    names = {layer.name for layer in layers}
    if other := sorted(names ^ rows.keys()):
        which = "the model has" if other[0] in names else "the analysis has"
        raise ModelError(f"{which} a layer {label(other[0])} and the other has none; {_AGAIN}")
    for layer in layers:
        row = rows[layer.name]
        if row["reason"] is not None:
            continue
        if layer.reason is not None:
            raise ModelError(f"layer {label(layer.name)} was analysed, and cannot be replaced here: {layer.reason}")
        own = {"kind": layer.kind, "weight": list(layer.weight), "params": layer.params, "own_bias": layer.own_bias}
        if differ := [name for name in own if own[name] != row[name]]:
            was, now = row[differ[0]], own[differ[0]]
            raise ModelError(f"layer {label(layer.name)}: {differ[0]} was {was} and is {now}; {_AGAIN}")
    return [x if (reason := rows[x.name]["reason"]) is None else x.left_out(reason) for x in layers]


def _digests(model: nn.Module, layers: Sequence[Layer], whole: bool) -> dict[str, list[Any]]:
    """Type, shape and CRC-32 of the weights that spectra are of; ``whole``: of all tensors that moments depend on."""
    tensors: dict[str, Any] = {}
    for layer in decomposable(layers):
        prefix, module = f"{layer.name}." if layer.name else "", layer.module
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        tensors |= {prefix + name: tensor for name, tensor in own.items() if name != "bias"}
    if whole:
        tensors |= model.state_dict(keep_vars=True)
    plain = {n: t for n, t in tensors.items() if isinstance(t, Tensor) and has_plain_memory(t) and not is_freed(t)}
    return {name: [str(t.dtype), list(t.shape), crc32(t)] for name, t in plain.items()}


def _check_digests(was: Mapping[str, Sequence[Any]], now: Mapping[str, Sequence[Any]]) -> None:
    for name in {**was, **now}:
        if name not in was or name not in now:
            where = "the analysis" if name not in was else "the model"
            raise ModelError(f"the tensor {name!r} is missing in {where}; {_AGAIN}")
        if list(was[name][:2]) != list(now[name][:2]):
            raise ModelError(
                f"{name!r} was {was[name][0]} {was[name][1]} and is {now[name][0]} {now[name][1]}; {_AGAIN}"
            )
        if was[name][2] != now[name][2]:
            raise ModelError(f"{name!r} has other values than when it was analysed (CRC-32 differs); {_AGAIN}")


def _of_spectra(name: str, spectra: LayerSpectra, tensors: dict[str, Tensor]) -> dict[str, Any]:
    folds = []
    for (scheme, groups), values in spectra.values.items():
        tensors[place := f"spectra.{name}.{scheme}.{groups}"] = values
        folds.append([scheme, groups, place])
    return {"values": folds, "top": list(spectra.top.items()), "float32": sorted(spectra.float32)}


def _spectra(layer: DecomposableLayer, note: Mapping[str, Any], read: Read) -> LayerSpectra:
    values = {(scheme, groups): read(place) for scheme, groups, place in note["values"]}
    float32 = frozenset((scheme, groups) for scheme, groups in note["float32"])
    return LayerSpectra(layer, values, dict(note["top"]), float32=float32)


def _moments(note: Mapping[str, Any], read: Read) -> Moments:
    tensors: dict[str, Any] = {field: read(f"moments.{place}") for field, place in note["tensors"].items()}
    numbers = {field: value for field, value in note.items() if field != "tensors"}
    return Moments(**{"second": None, **tensors, **numbers})


def _entry(name: str, tensor: Tensor) -> Entry:
    return Entry(name, CODES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size())


def _bytes(tensor: Tensor) -> Iterator[memoryview]:
    if tensor.numel():
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
