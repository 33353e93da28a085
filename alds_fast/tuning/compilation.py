"""Kernels compiled ahead in other processes, for a device that these processes do not touch.

A launch on tensors without data, with Triton's launcher told to compile only, asks for the very code that the launch on
the device will ask for; it is then found in Triton's own cache. The processes run ``compile_worker``, not the script of
the user, which multiprocessing would run again; a fork of a process that has a CUDA context could not compile.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
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
    waiting, lock, stopped, done = iter(work), threading.Lock(), threading.Event(), 0

    def serve(worker: _Worker) -> None:
        nonlocal done
        with worker:
            while True:
                with lock:
                    one = next(waiting, None)
                if one is None:
                    return
                shared, spilled, error = worker.compile(one)
                if stopped.is_set():
                    return
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

    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # compilers that are killed leave files
    with folder, concurrent.futures.ThreadPoolExecutor(max(1, count)) as pool:
        workers = [_Worker(rates.capability, folder.name) for _ in range(count)]
        try:
            for future in [pool.submit(serve, worker) for worker in workers]:
                future.result()
        finally:  # also at an interrupt: nothing is waited for
            stopped.set()
            for worker in workers:
                worker.stop()
    return faults


class _Worker:
    """A process that compiles; started by the first compilation, and again after one at which it ended."""

    def __init__(self, capability: tuple[int, int], folder: str) -> None:
        self._capability, self._folder = capability, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._starting, self._stopped = threading.Lock(), False

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *of_error: object) -> None:
        self.stop()
        if self._process is not None:
            self._process.communicate()

    def stop(self) -> None:
        """End the process with the compilers that it has started, also from another thread; no other is started."""
        with self._starting:
            self._stopped, process = True, self._process
        if process is not None:
            _end(process)

    def compile(self, one: Compilation) -> tuple[int, int, str]:
        """(bytes of shared memory, bytes that spill of the launch that takes the tiling, what went wrong)."""
        with self._starting:
            if self._stopped:
                return 0, 0, "it was stopped"
            process = self._process = self._process or self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump(one, process.stdin)
            process.stdin.flush()
            answer = process.stdout.readline()
            shared, spilled, error = json.loads(answer)
        except (OSError, ValueError) as e:  # it has ended
            _end(process)
            process.communicate()
            self._process = None
            return 0, 0, f"the process that compiles ended with {process.returncode} ({e})"
        return int(shared), int(spilled), str(error)

    def _started(self) -> subprocess.Popen[bytes]:
        variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        variables |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TMPDIR": self._folder}
        command = [sys.executable, "-m", f"{__package__}.compile_worker", *map(str, self._capability)]
        pipe = subprocess.PIPE  # of a session of its own, which an interrupt from the terminal does not reach
        return subprocess.Popen(command, env=variables, stdin=pipe, stdout=pipe, start_new_session=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
