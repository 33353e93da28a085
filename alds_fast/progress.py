"""How far work is: told to a function, or shown as bars on standard error and in notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .errors import ArgumentError

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much, 0 where that is not known
ProgressOption = Progress | bool | None
SLOWEST = 3600.0  # seconds that steps which tell of the speed may take together


def tell_nobody(what: str, done: int, total: int) -> None:
    """The progress that nobody asked for."""


@contextmanager
def telling(progress: ProgressOption) -> Iterator[Progress]:
    """What to tell (what, done, total) inside: the function given, or bars, one for each part of the work.

    True shows bars, False none, and None shows them where standard error is a terminal, and in notebooks. ArgumentError
    for anything else.

    >>> with telling(lambda what, done, total: print(what, done, total)) as tell:
    ...     tell("spectra", 1, 2)
    spectra 1 2
    """
    if callable(progress):
        yield progress
        return
    if progress is not None and not isinstance(progress, bool):
        raise ArgumentError(
            f"progress={progress!r}: expected True, False, None for bars on a terminal, or a function of "
            f"(what, done, total)"
        )
    bars = _Bars(progress)
    try:
        yield tell_nobody if progress is False else bars.tell
    finally:
        bars.close()


class _Bars:
    """Bars that appear with the first that is told."""

    def __init__(self, shown: bool | None) -> None:
        self._shown = shown
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def _open(self) -> Any:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        shown = console.is_terminal or console.is_jupyter if self._shown is None else self._shown
        share = progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TaskProgressColumn()
        times = progress.TimeElapsedColumn(), progress.TextColumn("left"), progress.TimeRemainingColumn()
        bars = progress.Progress(*share, *times, console=console, disable=not shown, speed_estimate_period=SLOWEST)
        bars.start()
        return bars

    def tell(self, what: str, done: int, total: int) -> None:
        """Move the bar of that part of the work."""
        if self._bars is None:
            self._bars = self._open()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total or None)
        self._bars.update(self._tasks[what], completed=done)

    def close(self) -> None:
        """Leave the bars as they are."""
        if self._bars is not None:
            self._bars.stop()
