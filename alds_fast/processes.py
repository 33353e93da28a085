"""The processes that work on one job: one, or those that torchrun started, who share what they have seen."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ArgumentError, WorkerError

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=7)  # one process may work for long while the others wait


class World:
    """``rank`` of ``size`` processes, which do the same one after the other: what one of them calls, all call.

    A process that fails does not come to the next call: it ends at once with its error, torchrun ends the others, and
    until then a WorkerError does. ``device`` is where this process computes.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size, self.device = rank, size, device or torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this is the process that does what only one may do."""
        return self.rank == 0

    def together(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            with _others():
                dist.barrier()

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

    def takes(self, number: int) -> bool:
        """Whether this process takes the batch of that number, from 1: the first takes the first."""
        return (number - 1) % self.size == self.rank

    def tell(self, value: T) -> list[T]:
        """What all processes tell each other, by rank; tensors on the CPU."""
        values = [value] * self.size
        if self.size > 1:
            with _others():
                dist.all_gather_object(values, value)
        return values

    def told_by(self, rank: int, value: T | None) -> T:
        """What one process tells all, who pass None; tensors on the CPU."""
        values: list[Any] = [value]
        if self.size > 1:
            with _others():
                dist.broadcast_object_list(values, src=rank)
        return cast(T, values[0])

    def told_first(self, value: T) -> list[T]:
        """What all processes tell the first, by rank, which is nothing for the others; tensors on the CPU."""
        values: list[Any] | None = [None] * self.size if self.first else None
        if self.size == 1:
            return [value]
        with _others():
            dist.gather_object(value, values, dst=0)
        return values or []

    def add_up(self, rows: Sequence[Sequence[Tensor]], rank: int = 0) -> list[list[Tensor]]:
        """Rows of float64 tensors, added up over all processes at the one of that ``rank``, in place.

        A process that has nothing of a row passes an empty one. What the others get is of no use.
        """
        if self.size == 1:
            return [list(row) for row in rows]
        shapes = self.tell([[t.shape for t in row] for row in rows])
        sums = []
        for row, *known in zip(rows, *shapes, strict=True):
            shape = max(known, key=len)
            zeros = (torch.zeros(s, dtype=torch.float64, device=self.device) for s in shape)
            sums.append(list(row) or list(zeros))
            for tensor in sums[-1]:
                self._reduce(tensor, rank)
        return sums

    def _reduce(self, tensor: Tensor, rank: int) -> None:
        with _others():
            dist.reduce(tensor, dst=rank)


@contextmanager
def _others() -> Iterator[None]:
    """WorkerError if one of them has ended."""
    try:
        yield
    except RuntimeError as e:
        raise WorkerError(
            f"another process of this job has ended, its own message says why; what was finished is kept, run the same "
            f"command again to go on ({e})"
        ) from e


@contextmanager
def join_processes(device: torch.device | None = None) -> Iterator[World]:
    """The processes that torchrun started with this one (by RANK and WORLD_SIZE), or just this one.

    Tensors on the CPU go over gloo, those on GPUs over NCCL if each process has one of its own.

    Raises ArgumentError where the variables are no numbers, WorkerError where the others cannot be reached.
    """
    try:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as e:
        raise ArgumentError(f"RANK and WORLD_SIZE are set, as torchrun does, but not to numbers: {e}") from e
    if size <= 1:
        yield World(device=device)
        return
    try:
        dist.init_process_group(_backend(device), rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as e:
        raise WorkerError(f"rank {rank} of {size} cannot reach the others ({e}); start them with torchrun") from e
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()


def _backend(device: torch.device | None) -> str:
    """How processes send tensors: NCCL refuses two processes of one GPU."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    apart = device is not None and device.type == "cuda" and local <= torch.cuda.device_count()
    return "cpu:gloo,cuda:nccl" if apart else "gloo"


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
