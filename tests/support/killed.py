"""Run a job again and again, each time in a new process that is killed at another moment, until one gets through.

Usage: killed.py SOURCE OUTPUT [data]. With "data" it is one with the batches below. Prints how often it was killed, by
how. (The processes are forked after the imports, and
nothing has been computed before: a thread pool would not survive a fork.)
"""

import itertools
import os
import random
import signal
import sys
from collections import Counter

import torch
import transformers

import alds_fast as alds
from alds_fast import files
from alds_fast.checkpoints import safetensors_writer
from alds_fast.checkpoints.streaming import factors_and_files, journal, source_checksums, spectra_and_plan

HOW = ("before a file gets its name", "after a file got its name", "in the middle of a file", "at a random moment")


LEAST = 20
WITH_DATA = {"sensitivity": "kl", "include": "model.layers.*"}


def batches(count=4):
    """Tokens of the small models."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(96, (4, 16), generator=generator)} for _ in range(count)]


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _doomed(how, seed, longest):
    """Arrange for this process to be killed; it finishes one file at least, if there are any left to write.

    (The first may be the record of what is in the source, which every process writes.)
    """
    replace, count = os.replace, itertools.count(1)

    def dying_replace(a, b):
        number = next(count)
        if how == HOW[0] and number == 3:
            _die()
        replace(a, b)
        if how == HOW[1] and number == 2:
            _die()

    write_whole = files.write_whole
    written = itertools.count(1)

    def dying_write(path, pieces):
        number = next(written)

        def cut():
            for piece in pieces:
                yield piece[: len(piece) // 2]
                if number == 3:
                    _die()
                yield piece[len(piece) // 2 :]

        write_whole(path, cut())

    if how in HOW[:2]:
        os.replace = dying_replace
    elif how == HOW[2]:
        for module in (source_checksums, journal, safetensors_writer, spectra_and_plan, factors_and_files):
            module.write_whole = dying_write
    else:
        signal.setitimer(signal.ITIMER_REAL, random.Random(seed).uniform(0.0, longest))
        signal.signal(signal.SIGALRM, lambda *_: _die())


def main():
    source, output, *data = sys.argv[1:]
    options = {"data": batches(), "refit": True, **WITH_DATA} if data else {"max_shard_bytes": 60_000}
    assert transformers.LlamaForCausalLM
    killed = Counter()
    for attempt in itertools.count():
        ways = HOW[:3] if data and attempt < LEAST else HOW  # in one random moment a job with data may come to its end
        how = ways[attempt % len(ways)]
        child = os.fork()
        if child == 0:
            _doomed(how, attempt, 2.0 if data else 0.1)
            alds.compress_checkpoint(source, output, params=0.7, **options)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
        killed[how] += 1
        assert attempt < 500
    print(sum(killed.values()), dict(killed))


if __name__ == "__main__":
    main()
