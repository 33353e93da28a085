"""Jobs that end in the middle, in this process."""

import itertools
from contextlib import contextmanager

import pytest

from alds_fast.checkpoints.streaming.journal import Journal


@contextmanager
def cut_off(monkeypatch, kind, number, when):
    """A job in it ends before or after it has kept its result of that kind and number."""
    put, count = Journal.put, itertools.count()

    def failing(self, what, *args):
        cut = what == kind and next(count) == number
        if when == "after" or not cut:
            put(self, what, *args)
        if cut:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "put", failing)
        yield
