"""Processes share work so that each item is done once and no process has much more than another."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alds_fast.errors import ArgumentError, WorkerError
from alds_fast.processes import World, join_processes, own_device


@given(st.lists(st.floats(0.1, 100), max_size=30), st.integers(1, 5))
def test_every_item_once_and_even(costs, size):
    parts = [World(rank, size).share(range(len(costs)), costs.__getitem__) for rank in range(size)]
    assert sorted(i for part in parts for i in part) == list(range(len(costs)))
    loads = [sum(costs[i] for i in part) for part in parts]
    assert max(loads, default=0) - min(loads, default=0) <= max(costs, default=0) + 1e-9
    assert all(costs[a] >= costs[b] for part in parts for a, b in itertools.pairwise(part))


def test_one_process_needs_no_others(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_processes() as world:
        assert (world.rank, world.size, world.first) == (0, 1, True)
        world.together()


def test_environments_that_are_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")
    with (
        pytest.raises(ArgumentError, match="WORLD_SIZE are set, as torchrun does, but not to numbers"),
        join_processes(),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(WorkerError, match="rank 1 of 2 cannot reach the others"), join_processes():
        pass


def test_devices():
    assert own_device("cpu") == torch.device("cpu")
    for name, text in (("tpu", "device='tpu'"), ("meta", "is not cpu or cuda")):
        with pytest.raises(ArgumentError, match=text):
            own_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(ArgumentError, match="torch finds no CUDA device"):
            own_device("cuda")
