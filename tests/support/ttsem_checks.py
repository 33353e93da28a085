"""Launches of Triton kernels under ttsem, which executes their compiled IR on the CPU and checks every access.

An access out of bounds, a race between programs and an undefined value raise at the launch. Memory that nobody wrote
is NaN. Beyond what ttsem does by itself: the tensors of a launch lie far apart, so that no access beyond the end of one
lands in another; and what a ticket puts in order is no race, which ttsem, without acquire and release, calls one.
"""

import contextlib
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

GAP = 1 << 40  # bytes from one tensor of a launch to the next
ACQ_REL = "sem = 4"  # how the IR spells the memory order of an atomic addition


class Launch(NamedTuple):
    """A launch: its kernel, its arguments, and whether ttsem calls a race what a ticket puts in order."""

    kernel: str
    arguments: dict
    ticket: bool = False


def move_apart(record):
    """Give each tensor of a recorded launch an address of its own; alignment stays as it is."""
    bases = sorted(set(record.bases.values()))
    moved = {base: i * GAP + base % 4096 for i, base in enumerate(bases, 1)}
    for name, base in record.bases.items():
        record.ptrs[name] += moved[base] - base
        record.bases[name] = moved[base]


def _draws(log):
    """ticket -> program -> the place in the log where it drew, in order of the draws."""
    draws = {}
    for place, (program, kind, op, addresses, *_) in enumerate(log):
        if kind == "a" and ACQ_REL in op and addresses.size == 1:
            draws.setdefault(int(addresses[0]), {})[program] = place
    return draws


def without_ticketed(log):
    """The log of accesses without those that a ticket puts after all that they could race with.

    Programs store their part and then draw from the ticket (acquire and release), each once. Whoever draws last comes
    after every store before a draw, in every schedule: its loads of what these stored are dropped, and its store to the
    ticket. An entry is (program, "r" or "w" or "a" or "s", operation, addresses, bytes an element, bytes written).
    """
    dropped = {}
    for ticket, draws in _draws(log).items():
        last = next(reversed(draws))
        stored = [
            e[3] for i, e in enumerate(log) if e[1] in "ws" and e[0] in draws and e[0] != last and i < draws[e[0]]
        ]
        stored = np.concatenate(stored) if stored else np.zeros(0, dtype=np.int64)
        for place in range(draws[last] + 1, len(log)):
            program, kind, _, addresses, *_ = log[place]
            if program == last and kind != "a":
                ordered = np.isin(addresses, stored) if kind == "r" else addresses == ticket
                dropped[place] = dropped.get(place, False) | ordered
    return [_part(entry, ~dropped[i]) if i in dropped else entry for i, entry in enumerate(log)
            if i not in dropped or not dropped[i].all()]  # fmt: skip


def _part(entry, kept):
    program, kind, op, addresses, size, raw = entry
    return program, kind, op, addresses[kept], size, None if raw is None else raw.reshape(kept.size, -1)[kept].ravel()


@contextlib.contextmanager
def checked_launches():
    """Triton's launches are checked; hands out the list that they are added to, and ttsem's session."""
    from ttsem import harness, mlir, pidraces, sanitize

    def ir(record, stage, target):
        """Compiled no further than it is executed: ttsem takes every kernel to machine code first."""
        return mlir.to_generic(harness._stage_text(record, stage, target), None)

    mlir.enable_generic_printing()
    launches, record_launch, find_race = [], harness.record_launch, pidraces.find_race

    def recorded(*args, **kwargs):
        recording = record_launch(*args, **kwargs)
        move_apart(recording.record)
        launches.append(Launch(recording.record.fn_name, recording.record.bound))
        return recording

    def race(log):
        rest = without_ticketed(log or [])
        if sum(e[3].size for e in rest) < sum(e[3].size for e in log or []):
            launches[-1] = launches[-1]._replace(ticket=find_race(log) is not None)
        return find_race(rest)

    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    try:
        with (
            mock.patch.multiple(harness, record_launch=recorded, ir_for_launch=ir),
            mock.patch.object(pidraces, "find_race", race),
            sanitize.session(cuda_is_cpu=False) as session,
        ):
            yield launches, session
    finally:
        torch.use_deterministic_algorithms(False)
