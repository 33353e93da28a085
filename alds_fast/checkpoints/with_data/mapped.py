"""Models whose weights are mapped out of files: in memory is what has been used since it was last let go."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...blocks import find_blocks
from ...errors import ModelError
from ...measurement import MAPPED
from ..pretrained import class_of
from ..safetensors_reader import Shards
from .offloading import is_offloaded, offloaded

_DONTNEED = 4  # of madvise


def load_mapped(shards: Shards, device: torch.device, wide: bool = False) -> nn.Module:
    """The dense model in the type that it is stored in, its weights mapped out of the files, on the CPU.

    ``wide``, and float16 where a CPU computes with it, as float32, in memory.
    """
    cls = class_of(shards.config)
    fixed = {"dtype": "auto", "local_files_only": True, "trust_remote_code": False}
    try:
        model: nn.Module = cls.from_pretrained(shards.folder, **fixed)
    except Exception as e:
        raise ModelError(f"transformers cannot load {str(shards.folder)!r}: {type(e).__name__}: {e}") from e
    config: Any = model.config
    config.use_cache = False
    types = {p.dtype for p in model.parameters()}
    if (wide and types - {torch.float32, torch.float64}) or (device.type == "cpu" and torch.float16 in types):
        model = model.float()
    else:
        setattr(model, MAPPED, True)
    if is_offloaded(device):
        setattr(model, MAPPED, True)  # its weights are where they are for a run only
    return model


def let_go(folders: Iterable[Path]) -> None:
    """Take the pages of the safetensors files in these folders out of this process's memory, and what malloc has free.

    Mapped tensors keep their values, which are read again where they are used; none of them may have been changed in
    place. On Linux; elsewhere the system does so when memory is short.
    """
    if not sys.platform.startswith("linux"):
        return
    wanted, libc = {folder.resolve() for folder in folders}, ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        name = line.removesuffix(" (deleted)")
        if name.endswith(".safetensors") and Path((fields := name.split(maxsplit=5))[5]).parent in wanted:
            start, end = (int(number, 16) for number in fields[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)
    if hasattr(libc, "malloc_trim"):  # of glibc: up to 0.2 GB of holes between what is in use
        libc.malloc_trim(0)


@contextmanager
def one_block_at_a_time(model: nn.Module, folder: Path, lists: Sequence[str] | None = None) -> Iterator[None]:
    """Runs of the model let its mapped weights go after every block, found or in ``lists``."""
    with ExitStack() as stack:
        for block in find_blocks(model, lists):
            hook = model.get_submodule(block).register_forward_hook(lambda *_: let_go([folder]))
            stack.callback(hook.remove)
        yield


def run_on(
    device: torch.device, model: nn.Module, folder: Path, blocks: Sequence[str] | None = None
) -> AbstractContextManager[None]:
    """The model runs there, with one of its blocks at a time; ``blocks``: by default those that look like some."""
    if not is_offloaded(device):
        return nullcontext()
    return offloaded(model, find_blocks(model) if blocks is None else blocks, device, lambda: let_go([folder]))
