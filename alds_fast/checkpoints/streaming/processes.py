"""The processes that work on one job: one, or those that torchrun started, who wait for each other over gloo."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from ...errors import ArgumentError, WorkerError

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=7)  # one process may work for long while the others wait


class World:
    """``rank`` of ``size`` processes."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this is the process that does what only one may do."""
        return self.rank == 0

    def together(self) -> None:
        """Wait until all processes are here; WorkerError if one of them has ended.

        A process that fails does not come here: it ends at once with its error, and torchrun ends the others.
        """
        if self.size > 1:
            try:
                dist.barrier()
            except RuntimeError as e:
                raise WorkerError(
                    f"another process of this job has ended, its own message says why; what was finished is kept, run "
                    f"the same command again to go on ({e})"
                ) from e

    def share(self, items: Sequence[T], cost: Callable[[T], float]) -> list[T]:
        """This process's part of the items: the dearest first, each to the process that has least to do.

        All processes must pass the same items.
        """
        loads = [0.0] * self.size
        share = []
        for item in sorted(items, key=cost, reverse=True):
            rank = loads.index(min(loads))
            loads[rank] += cost(item)
            if rank == self.rank:
                share.append(item)
        return share


@contextmanager
def join_processes() -> Iterator[World]:
    """The processes that torchrun started with this one (by RANK and WORLD_SIZE), or just this one.

    Raises ArgumentError where the variables are no numbers, WorkerError where the others cannot be reached.
    """
    try:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as e:
        raise ArgumentError(f"RANK and WORLD_SIZE are set, as torchrun does, but not to numbers: {e}") from e
    if size <= 1:
        yield World()
        return
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as e:
        raise WorkerError(f"rank {rank} of {size} cannot reach the others ({e}); start them with torchrun") from e
    try:
        yield World(rank, size)
    finally:
        dist.destroy_process_group()


def own_device(device: str) -> torch.device:
    """The device named; "cuda" is the GPU of this process's LOCAL_RANK. ArgumentError if there is no such device."""
    try:
        place = torch.device(device)
    except RuntimeError as e:
        raise ArgumentError(f"device={device!r}: {e}") from e
    if place.type not in ("cpu", "cuda"):
        raise ArgumentError(f"device={device!r} is not cpu or cuda")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device={device!r}, but torch finds no CUDA device here; use device='cpu'")
    if device == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return place
