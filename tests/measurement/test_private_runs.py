"""Runs of a user's model that leave no trace."""

import copy
import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast.allocation import end_to_end
from alds_fast.errors import ModelError
from alds_fast.linalg import Decomposition
from alds_fast.measurement import copy_batch, private_runs


class Stateful(nn.Module):
    """Changes whatever a forward can change: its input, its attributes, buffers, generators and global state."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.last, self.history, self.memory = None, [], {"sum": torch.zeros(16), "steps": [0]}
        self.cache, self.noise = SimpleNamespace(keys=torch.zeros(16), filled=0), torch.Generator().manual_seed(3)
        self.drawn = np.random.default_rng(1), np.random.RandomState(2), random.Random(3)
        self.counts, self.pair = np.zeros(4), (torch.zeros(16), [0])
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        x.mul_(2).add_(torch.rand(x.shape, generator=self.noise) + torch.rand(()) + random.random() + np.random.rand())
        x += sum(source.random() for source in self.drawn) + self.counts[0] + self.pair[0]
        self.counts += 1
        self.pair[0].add_(1), self.pair[1].append(1)
        self.last = self.body(x) + self.memory["sum"] + self.cache.keys
        self.history.append(self.last)
        self.memory["sum"] += x.detach().mean(0)
        self.memory["steps"].append(len(self.history))
        self.cache.filled, self.fresh = self.cache.filled + 1, True
        self.cache.keys.add_(1)
        self.seen += 1
        return self.last


def state(model):
    memory, cache = model.memory, model.cache
    tensors = [memory["sum"], cache.keys, model.seen, torch.tensor(model.counts), model.pair[0]]
    tensors += [model.noise.get_state(), *model.parameters()]
    drawn = str(model.drawn[0].bit_generator.state), str(model.drawn[1].get_state()), model.drawn[2].getstate()
    plain = drawn, len(model.pair[1]), model.last, list(model.history), list(memory["steps"]), cache.filled
    plain += (hasattr(model, "fresh"),)
    numbers = torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64)), random.getstate()
    return [t.detach().clone() for t in [*tensors, *numbers[:2]]], (*plain, numbers[2], model.training)


def same(before, after):
    return before[1] == after[1] and all(map(torch.equal, before[0], after[0]))


@pytest.mark.parametrize("options", [{}, {"sensitivity": True}, {"refit": True}])
def test_model_batches_and_random_numbers_are_left_as_they_were(options):
    model, batches = Stateful(), [torch.randn(8, 16) for _ in range(3)]
    kept, before = copy.deepcopy(batches), state(model)
    alds.compress(model, params=0.6, data=batches, **options)
    assert same(before, state(model)) and all(map(torch.equal, kept, batches))
    alds.compress(model, flops=0.6, example_inputs=batches[0])
    assert same(before, state(model)) and all(map(torch.equal, kept, batches))


def test_every_run_is_as_if_it_were_the_only_one():
    model, x = Stateful(), torch.randn(8, 16)
    with private_runs(model) as run:
        first, second, third = (run(x, number, "x") for number in (1, 1, 2))
        assert torch.equal(first, second) and not torch.equal(first, third)
    twin = copy.deepcopy(model)
    with private_runs(model) as run, private_runs(twin) as run_twin:
        assert torch.equal(run(x, 4, "x"), run_twin(x, 4, "x"))


def test_refit_of_a_model_that_changes_its_batch_is_that_of_one_that_does_not():
    class InPlace(nn.Sequential):
        def forward(self, x):
            return super().forward(x.sub_(1.0).div_(2.0))

    class Pure(nn.Sequential):
        def forward(self, x):
            return super().forward((x - 1.0) / 2.0)

    layers = nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)
    batches = [torch.randn(32, 16) for _ in range(2)]
    options = {"params": 0.6, "data": batches, "sensitivity": True, "refit": True}
    changing, plain = (alds.compress(kind(*layers), **options) for kind in (InPlace, Pure))
    for name, p in changing.named_parameters():
        assert torch.equal(p, plain.get_parameter(name))


def test_a_batch_is_copied_with_what_it_carries():
    cache = SimpleNamespace(keys=[torch.ones(2)])
    batch = {"x": torch.ones(2, requires_grad=True), "cache": cache, "flag": True}
    copied = copy_batch(batch)
    copied["x"].zero_()
    copied["cache"].keys.append(3)
    assert batch["x"].sum() == 2 and len(cache.keys) == 1 and copied["flag"] is True


def test_a_model_that_keeps_an_activation_can_be_compressed_with_gradients():
    class Keeps(nn.Sequential):
        last = None

        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    model = Keeps(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    small = alds.compress(model, params=0.6, data=[torch.randn(8, 16)], sensitivity=True, refit=True)
    assert model.last is None and small.last is None


class InferenceOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))

    @torch.inference_mode()
    def forward(self, x):
        return self.body(x)


def test_a_forward_in_inference_mode_gives_moments_but_no_gradients():
    model, batches = InferenceOnly(), [torch.randn(32, 16), torch.randn(32, 16)]
    small = alds.compress(model, params=0.6, data=batches, refit=True)
    plain = alds.compress(model.body, params=0.6, data=batches, refit=True)
    for name, p in small.body.named_parameters():
        assert torch.equal(p, plain.get_parameter(name))
    with pytest.raises(ModelError, match=r"runs in torch.inference_mode\(\).*leave out sensitivity="):
        alds.compress(model, params=0.6, data=batches, sensitivity=True)


def test_timing_leaves_the_example_inputs_as_they_were():
    model, x = Stateful(), torch.randn(8, 16)
    before, kept = state(model), x.clone()
    end_to_end(model, {"body.0": Decomposition(0, 1, 4)}, x, torch.device("cpu"))
    alds.deploy(alds.compress(model, params=0.6), x, rounds=1)
    assert torch.equal(x, kept) and same(before, state(model))


class Learns(nn.Module):
    """Changes its parameters in its forward, one of them past its version counter."""

    def __init__(self, size):
        super().__init__()
        self.layer, self.norm = nn.Linear(size, size), nn.LayerNorm(size)
        self.code = nn.Parameter(torch.zeros(size), requires_grad=False)

    def forward(self, x):
        with torch.no_grad():
            self.code.mul_(0.9).add_(x.mean(0))
            self.norm.weight.data.mul_(0.5)
        return self.layer(self.norm(x - self.code))


def test_parameters_that_a_forward_changes_are_put_back():
    model, x = Learns(24), torch.randn(8, 24)
    small = alds.compress(model, params=0.8, data=[x, x + 1], sensitivity=True, refit=True)
    for net in (model, small):
        assert not net.code.any() and torch.equal(net.norm.weight, torch.ones(24))


def test_a_large_parameter_that_a_forward_changes_is_refused():
    class Large(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.mul_(0.5)
            return super().forward(x)

    model = nn.Sequential(nn.Linear(24, 1100), Large(1100, 1100))
    with pytest.raises(ModelError, match=r"changes a parameter of shape \(1100, 1100\) in its forward"):
        alds.analyze(model, data=[torch.randn(4, 24)] * 2, groups=(1,))


class Locked:
    """A batch that cannot be copied as a whole."""

    def __init__(self, x):
        self.x, self.lock = x, threading.Lock()


def test_batches_that_cannot_be_copied_have_tensors_of_their_own():
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(24, 24)

        def forward(self, batch):
            return self.layer(batch.x.sub_(1.0))

    batches = [(Locked(torch.randn(16, 24)),) for _ in range(2)]
    before = [batch.x.clone() for (batch,) in batches]
    alds.compress(Takes(), params=0.8, data=batches, refit=True)
    assert all(torch.equal(batch.x, old) for (batch,), old in zip(batches, before, strict=True))
