"""Processes that are threads: what they tell each other goes through memory, pickled as between real ones."""

import pickle
import threading

from alds_fast.processes import World


class _Thread(World):
    def __init__(self, rank, size, barrier, values):
        super().__init__(rank, size)
        self.barrier, self.values = barrier, values

    def tell(self, value):
        self.values[self.rank] = pickle.dumps(value)
        self.barrier.wait()
        values = [pickle.loads(told) for told in self.values]
        self.barrier.wait()
        return values

    def told_by(self, rank, value):
        return self.tell(value)[rank]

    def told_first(self, value):
        values = self.tell(value)
        return values if self.first else []

    def together(self):
        self.tell(None)

    def _reduce(self, tensor, rank):
        parts = self.tell(tensor)
        if rank == self.rank:
            tensor.copy_(sum(parts[1:], parts[0]))


def in_worlds(size, job):
    """What ``job(world)`` returns in each of so many; the first error of one that was not left by the others."""
    barrier, values, results, errors = threading.Barrier(size), [b""] * size, [None] * size, []

    def run(rank):
        try:
            results[rank] = job(_Thread(rank, size, barrier, values))
        except threading.BrokenBarrierError:
            pass
        except Exception as e:
            errors.append(e)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
