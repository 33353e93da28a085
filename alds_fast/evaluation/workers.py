"""Cells of an evaluation, one after the other or in several processes."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch

from ..errors import ArgumentError, EvaluationError
from .cells import Cell, Task
from .run_cell import Record, Runner

Job = tuple[Cell, bool]  # a cell, and whether only its model is to be looked at
Outcome = tuple[Cell, Record | None, str, Exception | None]  # no record where the model was only looked at
_runner: Runner | None = None  # of this worker process


def serial(task: Task, jobs: Sequence[Job]) -> Generator[Outcome, None, None]:
    """The cells in this process: each with its record, its model's mark and the exception if it failed."""
    runner = Runner(task)
    for cell, look in jobs:
        yield _outcome(runner, cell, look)


def _outcome(runner: Runner, cell: Cell, look: bool) -> Outcome:
    return (cell, None, runner.mark_of(cell.seed), None) if look else (cell, *runner.run(cell))


def _start_worker(pickled: bytes) -> None:
    global _runner
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the parent, which ends the workers
    torch.set_num_threads(1)
    _runner = Runner(pickle.loads(pickled))


def _work(cell: Cell, look: bool) -> Outcome:
    assert _runner is not None
    _, record, mark, failure = _outcome(_runner, cell, look)
    # only its text goes back: an exception that cannot be pickled would break the pool
    return cell, record, mark, None if failure is None else RuntimeError(f"{type(failure).__name__}: {failure}")


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the end; only the main thread gets it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        raise KeyboardInterrupt


def parallel(task: Task, jobs: Sequence[Job], workers: int) -> Generator[Outcome, None, None]:
    """The same in several processes, in the order in which they are finished; closing it ends them.

    They are started afresh: a copy of a process that has used OpenMP could hang.
    """
    try:
        pickled = pickle.dumps(task)  # by itself: torch's own way would move the weights into shared memory
    except Exception as e:
        raise ArgumentError(
            f"workers={workers} needs a model and functions that can be pickled ({e}); define them in a module, not as "
            f"lambdas or inside a function, or use workers=1"
        ) from e
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (pickled,))
    try:
        with _without_interrupts():  # a process started in that moment would be lost sight of
            futures = [pool.submit(_work, *job) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
        pool.shutdown()
    except BrokenProcessPool as e:
        raise EvaluationError(
            "a worker process ended: it ran out of memory, or could not import what was passed in (a script that calls "
            "evaluate with workers needs `if __name__ == '__main__':`); finished cells are kept in out="
        ) from e
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
