"""A job with data, as torchrun starts it in each process; one of them may be killed.

Usage: in_processes.py SOURCE OUTPUT [RANK CALL]. With RANK and CALL that process is killed where it is told something
by the others for the CALL-th time.
"""

import itertools
import os
import signal
import sys

from support.killed import WITH_DATA, batches

import alds_fast as alds
from alds_fast.processes import World

OPTIONS = {"params": 0.7, "data": batches(5), "refit": True, "refine": 1, **WITH_DATA}


def _die_at(rank, call):
    tell, count = World.tell, itertools.count(1)

    def dying(self, value):
        if self.rank == rank and next(count) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return tell(self, value)

    World.tell = dying


if __name__ == "__main__":
    source, output, *place = sys.argv[1:]
    if place:
        _die_at(*map(int, place))
    alds.compress_checkpoint(source, output, **OPTIONS)
