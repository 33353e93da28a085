"""Times of layers inside of runs, with a clock that layers move on: no real time decides a test."""

import pytest
import torch
from torch import nn

from alds_fast.measurement import InputSpec, ms_by_part
from alds_fast.measurement.timing import timer


class Clock:
    """Seconds that pass by what runs; every ``slow``-th run is ten times as slow."""

    def __init__(self, slow=1000):
        self.now, self.runs, self.slow = 0.0, 0, slow

    def perf_counter(self):
        return self.now

    def passes(self, ms):
        self.now += ms / 1e3 * (10 if self.runs % self.slow == self.slow - 1 else 1)


class Taking(nn.Module):
    def __init__(self, clock, ms):
        super().__init__()
        self.clock, self.ms = clock, ms

    def forward(self, x):
        self.clock.passes(self.ms * len(x))
        return x


class Net(nn.Module):
    def __init__(self, clock):
        super().__init__()
        self.clock, self.twice, self.once, self.never = clock, *(Taking(clock, ms) for ms in (1, 5, 7))

    def forward(self, x):
        self.clock.runs += 1
        self.clock.passes(3)
        return self.once(self.twice(self.twice(x)) + self.twice(x[:1]))


def parts(monkeypatch, clock, **options):
    monkeypatch.setattr(timer, "time", clock)
    net, x = Net(clock), torch.zeros(2, 3)
    modules = dict(net.named_children())
    found = ms_by_part(lambda: net(x), modules, **{"rounds": 4, "repeats": 3, "steady": 0.2, **options})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules.values())
    return found, InputSpec.of(x), InputSpec.of(x[:1])


@pytest.mark.parametrize("slow", [1000, 4])
def test_each_call_counts_by_what_it_was_called_with(monkeypatch, slow):
    clock = Clock(slow)
    (whole, inside), two, one = parts(monkeypatch, clock)
    assert whole == pytest.approx(3 + 2 * 2 + 1 + 2 * 5) and clock.runs == 5  # one of them to warm up
    expected = {("twice", two): 4.0, ("twice", one): 1.0, ("once", two): 10.0}
    assert inside == {key: pytest.approx(ms) for key, ms in expected.items()}


def test_runs_far_apart_are_repeated(monkeypatch):
    """Where what is beside the layers takes another share every run."""
    clock = Clock()
    clock.passes = lambda ms: setattr(clock, "now", clock.now + ms / 1e3 * (clock.runs % 4 if ms == 3 else 1))
    (whole, inside), *_ = parts(monkeypatch, clock, steady=0.01)
    assert clock.runs == 3 * 5 and 15 < whole < 24
    assert sum(inside.values()) < whole


def test_nothing_to_time(monkeypatch):
    assert ms_by_part(lambda: None, {}, rounds=2, repeats=1, steady=1.0)[1] == {}
