"""Several processes that share the batches collect the moments of one."""

import copy

import pytest
import torch
from support.worlds import in_worlds
from torch import nn

from alds_fast.blocks import find_chain
from alds_fast.criteria import INPUTS, collect_by_blocks
from alds_fast.criteria.moments.held_rows import HeldRows
from alds_fast.errors import ArgumentError
from alds_fast.layers import decomposable, find_layers
from alds_fast.measurement import private_runs
from alds_fast.processes import World

FIELDS = ("second", "mean", "output", "held")


class Block(nn.Module):
    """Two layers that read one tensor, one that runs where there is a large number, and one wide one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.rare = (nn.Linear(8, 8, bias=bias) for bias in (True, False, True))
        self.back = nn.Linear(8, 8)

    def forward(self, x):
        y = self.a(x) + self.b(x)
        return x + self.back(y.relu() if float(y.detach().max()) < 50 else self.rare(y))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 2500)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x, attention_mask):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Store:
    def __init__(self):
        self.moments, self.gradients = {}, {}

    def has(self, kind, part):
        return False

    def keep(self, kind, part, results):
        (self.moments if kind == INPUTS else self.gradients).update(results)


def batches(count=5):
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(6) < torch.tensor([[6], [4], [5]])).long()
    return [{"x": 3 + torch.randn(3, 6, 5, generator=generator), "attention_mask": mask} for _ in range(count)]


def collected(model, data, world, **options):
    store, layers = Store(), decomposable(find_layers(model))
    with private_runs(model) as run:
        chain = find_chain(model, run, [(1, data[0])], "data=")
    assert chain.blocks, chain.reason
    collect_by_blocks(model, data, layers, chain, store, world=world, held_out=1 / 8, **options)
    return store


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    return Tower().eval()


def by_processes(tower, size, data, **options):
    models = [copy.deepcopy(tower) for _ in range(size)]
    return in_worlds(size, lambda world: collected(models[world.rank], data, world, **options))


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("sensitivity", [False, "kl"])
def test_same_as_of_one_process(tower, size, sensitivity):
    data = batches()
    options = {"sensitivity": sensitivity, "order": 6 if sensitivity else 8192}
    want = collected(copy.deepcopy(tower), data, World(), **options)
    got, *others = by_processes(tower, size, data, **options)
    assert got.moments.keys() == want.moments.keys() and len(want.moments) == 11
    assert not any(other.moments or other.gradients for other in others)
    for name, moments in want.moments.items():
        other = got.moments[name]
        for field in FIELDS:
            a, b = getattr(moments, field), getattr(other, field)
            assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-12, atol=1e-15), (name, field)
        assert other.rows == moments.rows and other.noise == pytest.approx(moments.noise, rel=1e-9)
        assert other.mean_noise == pytest.approx(moments.mean_noise, rel=1e-9)
    assert got.gradients.keys() == want.gradients.keys() and bool(want.gradients) == bool(sensitivity)
    for name, (gradient, noise) in want.gradients.items():
        assert torch.allclose(got.gradients[name][0], gradient, rtol=1e-12, atol=1e-18), name
        assert got.gradients[name][1] == pytest.approx(noise, rel=1e-9)


def test_a_layer_that_the_first_batch_does_not_reach(tower):
    data = batches()
    data[3]["x"] = 1000 * data[3]["x"]
    assert len(collected(copy.deepcopy(tower), data, World()).moments) > 11
    with pytest.raises(ArgumentError, match=r"batch 1 of data= does not reach layer 'blocks\.0\.rare', which others"):
        by_processes(tower, 2, data)
    assert len(by_processes(tower, 2, data[3:] + data[:3])[0].moments) > 11


def test_rows_kept_aside_do_not_depend_on_the_order():
    calls = {n: torch.randn(64 * (n % 4) + 1, 1, 2, generator=torch.Generator().manual_seed(n)) for n in range(1, 40)}
    one, two, back = HeldRows(), (HeldRows(), HeldRows()), HeldRows()
    for number, rows in calls.items():
        one.add(rows, number)
        two[number % 2].add(rows, number)
        back.add(calls[40 - number], 40 - number)
    assert 500 < len(one.rows()) <= 1024
    assert torch.equal(HeldRows.of_all(two).rows(), one.rows()) and torch.equal(back.rows(), one.rows())
    assert HeldRows.of_all([HeldRows(), HeldRows()]).rows() is None
