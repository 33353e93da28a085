"""Kernels compiled ahead in other processes, for a device that these processes do not touch.

A launch on tensors without data, with Triton's launcher told to compile only, asks for the very code that the launch on
the device will ask for; it is then found in Triton's own cache. The processes run ``compile_worker``, not the script of
the user, which multiprocessing would run again; a fork of a process that has a CUDA context could not compile.
"""

from __future__ import annotations

import concurrent.futures
import copy
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..kernels import LaunchKey, Tiling
from ..measurement import InputSpec
from ..progress import Progress
from .rates import Rates

_LOG = logging.getLogger(__name__)
MOST_PROCESSES = 16
META = torch.device("meta")


class Compilation(NamedTuple):
    """A call of a module (pickled, on the device "meta"), one of whose launches takes a tiling."""

    module: bytes
    spec: InputSpec
    key: LaunchKey
    tiling: Tiling


def without_data(module: nn.Module, dtype: torch.dtype | None = None) -> bytes | None:
    """A pickled copy without data, of that type; None if it cannot be pickled: its kernels compile where they run."""
    try:
        return pickle.dumps(_on_meta(module).to(dtype))
    except Exception:  # whatever copying and pickling a user's module raises
        return None


def _on_meta(module: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for t in (*module.parameters(), *module.buffers()):
        empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=META)
        memo[id(t)] = nn.Parameter(empty, False) if isinstance(t, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def compile_ahead(
    work: Sequence[Compilation], rates: Rates, told: Progress, processes: int | None = None
) -> dict[tuple[LaunchKey, Tiling], str]:
    """Fill Triton's cache; by key and tiling what spills or takes more shared memory than there is: it is not launched.

    What does not compile here is told to the logger: the launch on the device decides.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = processes or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    count = min(processes, MOST_PROCESSES, len(work))
    faults: dict[tuple[LaunchKey, Tiling], str] = {}
    waiting, lock, done = iter(work), threading.Lock(), 0

    def serve() -> None:
        nonlocal done
        with _Worker(rates.capability) as worker:
            while True:
                with lock:
                    one = next(waiting, None)
                if one is None:
                    return
                shared, spilled, error = worker.compile(one)
                with lock:
                    done += 1
                    if error:
                        _LOG.info("%s of %s is not compiled ahead: %s", one.tiling, one.key, error)
                    if spilled:
                        faults[one.key, one.tiling] = f"spills {spilled} bytes a thread"
                    if shared > rates.shared_limit:
                        limit = f"{rates.shared_limit} are there"
                        faults[one.key, one.tiling] = f"takes {shared} bytes of shared memory, {limit}"
                    told("kernels compiled", done, len(work))

    with concurrent.futures.ThreadPoolExecutor(max(1, count)) as pool:
        for future in [pool.submit(serve) for _ in range(count)]:
            future.result()
    return faults


class _Worker:
    """A process that compiles; started by the first compilation, and again after one at which it ended."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._capability = capability
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *of_error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def compile(self, one: Compilation) -> tuple[int, int, str]:
        """(bytes of shared memory, bytes that spill of the launch that takes the tiling, what went wrong)."""
        if self._process is None:
            self._process = self._started()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump(one, process.stdin)
            process.stdin.flush()
            answer = process.stdout.readline()
            shared, spilled, error = json.loads(answer)
        except (OSError, ValueError) as e:  # it has ended
            process.kill()
            process.communicate()
            self._process = None
            return 0, 0, f"the process that compiles ended with {process.returncode} ({e})"
        return int(shared), int(spilled), str(error)

    def _started(self) -> subprocess.Popen[bytes]:
        variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-m", f"{__package__}.compile_worker", *map(str, self._capability)]
        return subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
