"""Models whose weights are mapped out of files: in memory is what has been used since it was last let go."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...blocks import find_blocks
from ...errors import ModelError
from ...measurement import MAPPED
from ..pretrained import class_of
from ..safetensors_reader import CHUNK, CODES, Shards
from ..safetensors_writer import Entry, write_shard
from ..streaming.journal import WIDE
from ..streaming.streamed_model import Work
from .offloading import is_offloaded, offloaded

_DONTNEED = 4  # of madvise


def load_mapped(shards: Shards) -> nn.Module:
    """The dense model in the type that it is stored in, its weights mapped out of the files, on the CPU."""
    cls = class_of(shards.config)
    fixed = {"dtype": "auto", "local_files_only": True, "trust_remote_code": False}
    try:
        model: nn.Module = cls.from_pretrained(shards.folder, **fixed)
    except Exception as e:
        raise ModelError(f"transformers cannot load {str(shards.folder)!r}: {type(e).__name__}: {e}") from e
    config: Any = model.config
    config.use_cache = False
    setattr(model, MAPPED, True)
    return model


def as_computed(work: Work, model: nn.Module, kind: str, wide: bool = False) -> nn.Module:
    """The mapped model as runs compute with it: ``wide``, and float16 on a CPU, as float32.

    Parameters of half types then lie in a file of the journal, of that kind, and are mapped out of it; buffers of half
    types are in memory.
    """
    half = {name: p for name, p in model.named_parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
    if not wide and (work.device.type != "cpu" or all(p.dtype != torch.float16 for p in half.values())):
        return model
    folders, number = [work.shards.folder, work.journal.folder], work.world.rank

    def content(entry: Entry) -> Iterator[memoryview]:
        for part in half[entry.name].detach().view(-1).split(CHUNK):
            yield part.float().view(torch.uint8).numpy().data
        let_go(folders)

    work.journal.drop(kind, number)  # that of a run before: the disk holds one
    entries = [Entry(name, CODES[torch.float32], tuple(p.shape), 4 * p.numel()) for name, p in half.items()]
    write_shard(work.journal.path(kind, number), entries, content, {"notes": "{}"})
    for name, tensor in work.journal.some(kind, number, {name: name for name in half}).items():
        half[name].data = tensor
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.dtype.itemsize < 4:
            buffer.data = buffer.data.float()
    return model


def let_go(places: Iterable[Path]) -> None:
    """Take the pages of safetensors files, these or all in these folders, out of memory, and what malloc has free.

    Mapped tensors keep their values, which are read again where they are used; none of them may have been changed in
    place. On Linux; elsewhere the system does so when memory is short.
    """
    if not sys.platform.startswith("linux"):
        return
    wanted, libc = {place.resolve() for place in places}, ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        name = line.removesuffix(" (deleted)")
        if not name.endswith(".safetensors"):
            continue
        file = Path((fields := name.split(maxsplit=5))[5])
        if file in wanted or file.parent in wanted:
            start, end = (int(number, 16) for number in fields[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)
    if hasattr(libc, "malloc_trim"):  # of glibc: up to 0.2 GB of holes between what is in use
        libc.malloc_trim(0)


@contextmanager
def one_block_at_a_time(model: nn.Module, *places: Path, lists: Sequence[str] | None = None) -> Iterator[None]:
    """Runs of the model let weights mapped out of these places go after every block, found or in ``lists``."""
    with ExitStack() as stack:
        for block in find_blocks(model, lists):
            hook = model.get_submodule(block).register_forward_hook(lambda *_: let_go(places))
            stack.callback(hook.remove)
        yield


def _places(work: Work) -> list[Path]:
    """Where weights are mapped from: the checkpoint, and what lies in float32 in the journal."""
    return [work.shards.folder, *work.journal.folder.glob(f"*.{WIDE}*.safetensors")]


def let_weights_go(work: Work) -> None:
    """:func:`let_go` of what weights are mapped from."""
    let_go(_places(work))


@contextmanager
def runs_on_device(work: Work, *models: nn.Module, blocks: Sequence[str] | None = None) -> Iterator[None]:
    """Runs of these models are on the job's device.

    ``blocks``: what is there one at a time, by default those that look like some.
    """
    with ExitStack() as stack:
        for net in models if is_offloaded(work.device) else ():
            found = find_blocks(net, work.settings.blocks) if blocks is None else blocks
            stack.enter_context(offloaded(net, found, work.device, lambda: let_weights_go(work)))
        yield


@contextmanager
def runs(work: Work, model: nn.Module, *others: nn.Module, blocks: Sequence[str] | None = None) -> Iterator[None]:
    """As :func:`runs_on_device`, and the first model lets its weights go after every block."""
    with (
        one_block_at_a_time(model, *_places(work), lists=work.settings.blocks),
        runs_on_device(work, model, *others, blocks=blocks),
    ):
        yield
