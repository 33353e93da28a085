"""Processes share work so that each item is done once and no process has much more than another."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.worlds import in_worlds

from alds_fast import processes
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


def test_batches_go_round():
    worlds = [World(rank, 3) for rank in range(3)]
    assert [[n for n in range(1, 8) if world.takes(n)] for world in worlds] == [[1, 4, 7], [2, 5], [3, 6]]


def test_one_process_tells_itself():
    world, tensor = World(), torch.ones(2, dtype=torch.float64)
    assert (world.tell(1), world.told_by(0, 2), world.told_first(3)) == ([1], 2, [3])
    assert world.add_up([[tensor], []])[0][0] is tensor


@pytest.mark.parametrize("size", [2, 3])
def test_sums_of_rows_that_some_have_nothing_of(size):
    def job(world):
        mine = [torch.full((2,), float(world.rank + 1), dtype=torch.float64)]
        return world.add_up([mine, mine[:0] if world.first else [2 * mine[0]], []], size - 1)

    whole, some, nothing = in_worlds(size, job)[-1]
    assert whole[0].tolist() == [sum(range(1, size + 1))] * 2 and nothing == []
    assert some[0].tolist() == [2 * sum(range(2, size + 1))] * 2


@pytest.mark.parametrize(
    "device, local, gpus, backend",
    [("cpu", 2, 0, "gloo"), ("cuda", 2, 2, "cpu:gloo,cuda:nccl"), ("cuda", 2, 1, "gloo"), (None, 1, 8, "gloo")],
)
def test_how_tensors_are_sent(monkeypatch, device, local, gpus, backend):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert processes._backend(device and torch.device(device)) == backend


def test_devices():
    assert own_device("cpu") == torch.device("cpu")
    for name, text in (("tpu", "device='tpu'"), ("meta", "is not cpu or cuda")):
        with pytest.raises(ArgumentError, match=text):
            own_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(ArgumentError, match="torch finds no CUDA device"):
            own_device("cuda")
