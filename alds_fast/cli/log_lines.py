"""What the log tells while a command runs, on standard error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LOG = logging.getLogger("alds_fast")


class _Lines(logging.Handler):
    """Printed where standard error is at that moment: bars print them above themselves."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        print(record.getMessage(), file=sys.stderr)


@contextmanager
def log_lines() -> Iterator[None]:
    """What alds_fast tells its log, from level INFO on, is printed."""
    handler, level = _Lines(), _LOG.level
    _LOG.addHandler(handler)
    _LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        _LOG.removeHandler(handler)
        _LOG.setLevel(level)
