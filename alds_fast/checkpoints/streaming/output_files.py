"""Which files a compressed checkpoint has, and what is in them: decided by the input and the plan alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...factors import Choice
from ...linalg import index_count
from ..safetensors_reader import DTYPES, INDEX, SINGLE, Shards
from ..safetensors_writer import Entry

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5",
            ".msgpack", ".onnx", ".gguf", ".ot")  # fmt: skip


@dataclass(frozen=True)
class NarrowDense:
    """What takes the place of a layer that lost hidden units and stays dense: its sizes as they are stored."""

    name: str
    sizes: tuple[int, ...]


Replacement = Choice | NarrowDense


@dataclass(frozen=True)
class Part:
    """Tensors that stay together: one of the input, or what takes the place of a layer's weight.

    That is another weight, or the encoder, the decoder, and a mark: one value under the weight's name, ``mark``, whose
    shape no dense layer takes.
    """

    source: str
    entries: tuple[Entry, ...]
    layer: int | None = None
    mark: str | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(entry.size for entry in self.entries)


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file of the output."""

    name: str
    parts: tuple[Part, ...]

    @property
    def entries(self) -> list[Entry]:
        """Its tensors in their order."""
        return [entry for part in self.parts for entry in part.entries]

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(part.size for part in self.parts)


def _part(source: str, shards: Shards, choice: tuple[int, Replacement] | None, sizes: Mapping[str, int]) -> Part:
    stored = shards.tensors[source]
    if choice is None and source not in sizes:
        return Part(source, (Entry(source, stored.dtype, stored.shape, stored.size),))
    item = DTYPES[stored.dtype].itemsize
    if choice is None:
        return Part(source, (Entry(source, stored.dtype, (sizes[source],), item * sizes[source]),))
    (number, replacement), stem = choice, source.removesuffix("weight")
    if isinstance(replacement, NarrowDense):
        entry = Entry(source, stored.dtype, replacement.sizes, item * math.prod(replacement.sizes))
        return Part(source, (entry,), number)
    encoder, decoder = replacement.decomposition.factor_shapes(replacement.shape)
    shapes = {"encoder": encoder, "decoder": decoder, "weight": (1,) * len(stored.shape)}
    entries = [Entry(stem + name, stored.dtype, sizes, item * math.prod(sizes)) for name, sizes in shapes.items()]
    if indices := index_count(replacement.shape, replacement.decomposition.pivots):
        entries.append(Entry(f"{stem}order", "I64", (indices,), 8 * indices))
    return Part(source, tuple(entries), number, source)


def output_files(
    shards: Shards, choices: Mapping[str, tuple[int, Replacement]], most_bytes: int, sizes: Mapping[str, int]
) -> list[OutputFile]:
    """The files, each of no more than ``most_bytes`` unless one part alone is larger.

    ``choices``: by the name of the input's tensor the number of its layer and what replaces it; ``sizes``: of biases
    that lose values, how many are left.
    """
    groups: list[list[Part]] = [[]]
    for source in shards.tensors:
        part = _part(source, shards, choices.get(source), sizes)
        if groups[-1] and sum(p.size for p in groups[-1]) + part.size > most_bytes:
            groups.append([])
        groups[-1].append(part)
    if len(groups) == 1:
        return [OutputFile(SINGLE, tuple(groups[0]))]
    stem, total = SINGLE.removesuffix(".safetensors"), len(groups)
    return [OutputFile(f"{stem}-{i:05d}-of-{total:05d}.safetensors", tuple(parts)) for i, parts in enumerate(groups, 1)]


def index_of(files: list[OutputFile]) -> dict[str, object]:
    """The content of the index file."""
    placed = {entry.name: file.name for file in files for entry in file.entries}
    return {"metadata": {"total_size": sum(file.size for file in files)}, "weight_map": placed}


def companions(folder: Path, taken: set[str]) -> dict[str, Path]:
    """What a checkpoint directory holds beside the model, by relative name: tokenizer, licence, other modules' folders.

    Hidden files are left out, as are weights in other formats beside the model's.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    seen = {n: p for n, p in files.items() if not any(part.startswith(".") for part in n.split("/"))}
    return {n: p for n, p in seen.items() if "/" in n or not (n.endswith(_WEIGHTS) or n in {INDEX, *taken})}
