"""What a job with data needs of memory and disk, foretold from the header of its checkpoint before it begins.

A stage holds some matrices of its largest layer, or block, at once; how many follows from peaks of jobs that were
measured (docs/checkpoints.md).
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ...blocks import find_blocks
from ...criteria import MOST_ROWS, moment_forms
from ...errors import FileWriteError
from ...measurement import leaves_of
from ...text import size_text
from ..streaming.streamed_model import Work

LIBRARIES = 300 << 20  # bytes of what is loaded and compiled after the job has begun
IN_MEMORY = 1 << 24  # bytes of blocks' outputs that are kept in memory; what is beyond lies in files of the journal
WIDEST_INPUT = 8192  # columns of a layer whose input's moment is kept
_LOG = logging.getLogger(__name__)


class Needs(NamedTuple):
    """Bytes: of memory, all that the process has at most, and of disk, all that the output's directory has at most."""

    memory: int
    disk: int


class _Layer(NamedTuple):
    """Bytes in float64 of what the job has of a layer, and how wide it is."""

    block: str
    inputs: int  # the moment of what it reads
    gradients: int  # the moment of its gradients
    weight: int
    aside: int  # rows that are kept aside
    columns: int
    filters: int


def _layers(work: Work, blocks: Sequence[str], rows: int, gradients: bool) -> list[_Layer]:
    ready, layers = list(work.ready.values()), []
    for name, form in moment_forms(ready, WIDEST_INPUT, gradients, None).items():
        shape = next(layer.shape for layer in ready if layer.name == name)
        inputs = form.size(shape, False)
        aside = 4 * min(MOST_ROWS, rows // 8) * shape.conv_groups * shape.columns
        block = next((b for b in blocks if name.startswith(f"{b}.")), "")
        sizes = inputs, form.size(shape, gradients) - inputs, 8 * shape.numel, aside
        layers.append(_Layer(block, *sizes, shape.columns, shape.out_channels))
    return layers


def tokens_of(batch: Any) -> int:
    """Tokens of a batch, or how many samples it has where it holds none."""
    tensors = [leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    tokens = [tensor.numel() for tensor in tensors if tensor.dim() == 2 and not tensor.is_floating_point()]
    return max(tokens or map(len, tensors), default=0)


class _Checkpoint(NamedTuple):
    """What the files hold, and what will be left of it."""

    size: int  # bytes
    numbers: int
    item: int  # bytes of a number
    block: int  # bytes of the largest block, as it is computed with
    table: int  # rows of the largest matrix outside of blocks: how many outputs there are
    wide: bool  # whether it is computed with in float32, of which a copy lies on the disk
    left: int  # numbers of all factors


def _checkpoint(work: Work, blocks: Sequence[str]) -> _Checkpoint:
    in_blocks, table = dict.fromkeys(blocks, 0), 0
    for name, source in work.names.items():
        stored, block = work.shards.tensors[source], next((b for b in blocks if name.startswith(f"{b}.")), None)
        if block is not None:
            in_blocks[block] += stored.size
        elif len(stored.shape) == 2:
            table = max(table, stored.shape[0])
    size = sum(stored.size for stored in work.shards.tensors.values())
    numbers = sum(p.numel() for p in work.model.parameters())
    inner = sum(layer.shape.numel for layer in work.ready.values())
    left = max(0, inner - round((1 - work.settings.budget.get("params", 1.0)) * numbers))
    wide = work.device.type == "cpu" and any(stored.dtype == "F16" for stored in work.shards.tensors.values())
    item = max(1, round(size / max(1, numbers)))
    largest = max(in_blocks.values(), default=size) * (max(4, item) if wide else item) // item
    return _Checkpoint(size, numbers, item, largest, table, wide, left)


def needs_of(work: Work, batches: Sequence[Any], gradients: bool) -> Needs:
    """What the whole job needs, what this process uses already included.

    Layers that read one tensor are counted as if each read its own, error= as if nothing was left out.
    """
    blocks, rows = find_blocks(work.model, work.settings.blocks), [tokens_of(batch) for batch in batches]
    layers, parts = _layers(work, blocks, sum(rows), gradients), _checkpoint(work, blocks)
    if not layers:
        return Needs(_in_use() + LIBRARIES, parts.size)
    memory = _in_use() + LIBRARIES + _largest_stage(work, parts, layers, rows, gradients)
    ends = sum(rows) * statistics.mode(x.columns for x in layers) * parts.item * (len(blocks) if gradients else 1)
    copies = parts.item * (2 + bool(work.settings.refit)) + (4 if work.settings.refine else 0)  # of the factors
    dense = sum(x.weight for x in layers) // 8
    disk = sum(x.inputs + x.gradients + x.aside for x in layers) + max(0, ends - IN_MEMORY) + copies * parts.left
    if parts.wide or (parts.item < 4 and work.settings.refine):  # the dense model and the compressed one in float32
        disk += 4 * (2 * parts.numbers - (dense - parts.left))
    return Needs(memory, disk + parts.size - parts.item * (dense - parts.left))


def _largest_stage(
    work: Work, parts: _Checkpoint, layers: Sequence[_Layer], rows: Sequence[int], gradients: bool
) -> int:
    def of_block(*fields: str) -> int:
        sums = dict.fromkeys((x.block for x in layers), 0)
        for x in layers:
            sums[x.block] += sum(getattr(x, field) for field in fields)
        return max(sums.values())

    graph = 4 * max(rows) * of_block("columns", "filters")
    logits = (3 if gradients else 2) * parts.item * max(rows) * parts.table
    moments = max(of_block("inputs", "aside"), of_block("gradients")) + graph
    planned = max(2 * (x.inputs + x.gradients) + 4 * x.weight for x in layers)
    stages = [parts.block + max(moments, logits, planned)]
    if work.settings.refit:
        outputs = min(IN_MEMORY, 4 * sum(rows) * of_block("filters"))
        stages.append(2 * parts.block + outputs + max(3 * (x.inputs + x.weight) for x in layers))
    if work.settings.refine:
        block = parts.block if parts.wide or parts.item >= 4 else 4 * parts.block // parts.item
        stages.append((2 + 5) * block + graph)  # both; parameters, gradients, two of AdamW, the best ones
    return max(stages)


def _in_use() -> int:
    """Bytes of memory that this process has; on systems without /proc the most that it had."""
    table = Path("/proc/self/statm")
    if table.exists():
        return int(table.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def tell_needs(work: Work, batches: Sequence[Any], gradients: bool) -> None:
    """Say in the log what the job needs; FileWriteError where the disk has not as much left."""
    memory, disk = needs_of(work, batches, gradients)
    output = work.journal.output
    free = shutil.disk_usage(output).free
    _LOG.info(
        "the job takes about %s of memory and, until it is done, up to %s in %r, where %s are free",
        size_text(memory), size_text(disk), str(output), size_text(free),
    )  # fmt: skip
    missing = disk - sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    if free < missing:
        raise FileWriteError(
            f"{str(output)!r}: up to {size_text(missing)} are to be written there, moments and factors included, "
            f"{size_text(free)} are free: free some space, or name a directory on a larger disk"
        )
