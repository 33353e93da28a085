"""Moments collected block after block are those of whole passes."""

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast.blocks import LeftChain, Room, find_chain
from alds_fast.criteria import INPUTS, collect_by_blocks, collect_moments
from alds_fast.errors import ArgumentError
from alds_fast.layers import decomposable, find_layers
from alds_fast.measurement import private_runs

FIELDS = ("second", "mean", "output", "held")


class Residual(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.first, self.second = nn.Linear(width, 3 * width), nn.Linear(3 * width, width, bias=False)

    def forward(self, x, other=0.0):
        return x + self.second((self.first(x) + other).relu())


class Tower(nn.Module):
    """Layers before its blocks, in them, and after them."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 7)
        self.blocks = nn.ModuleList(Residual() for _ in range(4))

    def forward(self, x, attention_mask=None):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TwoLists(nn.Module):
    """Every block of the second list reads the end of the first."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList(Residual() for _ in range(2))
        self.decoder = nn.ModuleList(Residual() for _ in range(2))
        self.between = nn.Linear(8, 8)

    def forward(self, x, y):
        for block in self.encoder:
            x = block(x)
        y = self.between(y)
        for block in self.decoder:
            y = block(y, x.mean(-1, keepdim=True))
        return y


class Crossing(TwoLists):
    """Every block of the second list reads the output of one layer."""

    def forward(self, x, y):
        for block in self.encoder:
            x = block(x)
        other = self.between(x).mean(-1, keepdim=True)
        for block in self.decoder:
            y = block(y, other)
        return y


class Between(Tower):
    """One layer stands between any two blocks."""

    def forward(self, x, attention_mask=None):
        x = self.stem(x)
        for block in self.blocks:
            x = self.norm(block(x))
        return self.head(x)

    def __init__(self):
        super().__init__()
        self.norm = nn.Linear(8, 8)


class Store:
    """Results in memory."""

    def __init__(self):
        self.parts, self.moments, self.gradients = [], {}, {}

    def has(self, kind, part):
        return (kind, part) in self.parts

    def keep(self, kind, part, results):
        self.parts.append((kind, part))
        (self.moments if kind == INPUTS else self.gradients).update(results)


def made(kind=Tower):
    torch.manual_seed(0)
    model = kind().eval()
    generator = torch.Generator().manual_seed(1)
    if issubclass(kind, TwoLists):
        return model, [tuple(torch.randn(3, 4, 8, generator=generator) for _ in "12") for _ in range(3)]
    mask = (torch.arange(6) < torch.tensor([[6], [4], [5]])).long()
    return model, [{"x": torch.randn(3, 6, 5, generator=generator), "attention_mask": mask} for _ in range(3)]


def by_blocks(model, data, store, layers=None, **options):
    with private_runs(model) as run:
        chain = find_chain(model, run, list(enumerate(data, 1)), "data=")
    assert chain.blocks, chain.reason
    collect_by_blocks(model, data, layers or decomposable(find_layers(model)), chain, store, **options)


@pytest.mark.parametrize("kind", [Tower, TwoLists])
@pytest.mark.parametrize("limit", [0, 1 << 20], ids=["in files", "in memory"])
@pytest.mark.parametrize("sensitivity", [False, True])
def test_same_as_in_whole_passes(kind, limit, sensitivity):
    model, data = made(kind)
    options = {"sensitivity": sensitivity, "held_out": 1 / 8}
    want = collect_moments(model, data, decomposable(find_layers(model)), **options)
    store = Store()
    by_blocks(model, data, store, room=lambda: Room(limit), **options)
    assert store.moments.keys() == want.keys()
    for name, moments in want.items():
        got = store.moments[name]
        for field in FIELDS:
            a, b = getattr(moments, field), getattr(got, field)
            assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-6, atol=1e-9), (name, field)
        assert got.rows == moments.rows
        assert got.noise == pytest.approx(moments.noise, rel=1e-4)
        if sensitivity:
            gradient, noise = store.gradients[name]
            assert torch.allclose(gradient, moments.gradient, rtol=1e-4, atol=1e-9), name
            assert noise == pytest.approx(moments.gradient_noise, rel=1e-3)


def test_one_block_after_the_other_and_back():
    model, data = made()
    store, order = Store(), []
    layers = decomposable(find_layers(model))
    for name, module in model.named_modules():
        if name.endswith("first"):
            module.register_forward_hook(lambda *_, name=name: order.append(name))
    with private_runs(model) as run:
        chain = find_chain(model, run, list(enumerate(data, 1)), "data=")
    order.clear()
    collect_by_blocks(model, data, layers, chain, store, sensitivity=True)
    there = [f"blocks.{i}.first" for i in range(4) for _ in data]
    assert order == there + there[::-1]
    assert store.parts == [*((INPUTS, i) for i in range(5)), *(("gradients", i) for i in reversed(range(5)))]


@pytest.mark.parametrize("cut", range(1, 10))
def test_goes_on_from_what_is_known(cut):
    model, data = made()
    whole, store = Store(), Store()
    by_blocks(model, data, whole, sensitivity=True)

    class Cut(Exception):
        pass

    class Cutting(Store):
        def keep(self, kind, part, results):
            super().keep(kind, part, results)
            if len(self.parts) == cut:
                raise Cut

    store = Cutting()
    with pytest.raises(Cut):
        by_blocks(model, data, store, sensitivity=True)
    by_blocks(model, data, store, sensitivity=True)
    assert sorted(store.parts) == sorted(whole.parts)
    for name, moments in whole.moments.items():
        assert torch.equal(store.moments[name].second, moments.second)
        assert torch.equal(store.gradients[name][0], whole.gradients[name][0])


@pytest.mark.parametrize(
    "kind, words",
    [
        ("shared", r"layer 'blocks\.0\.first' is called by more than one block"),
        (Between, "layer 'norm' is called before and after the end of a block"),
        (Crossing, "the output of layer 'between' is used before and after the end of a block"),
    ],
)
def test_a_layer_that_belongs_to_no_one_part(kind, words):
    model, data = made(Tower if kind == "shared" else kind)
    if kind == "shared":
        model.blocks[2].first = model.blocks[0].first
    with pytest.raises(LeftChain, match=words):
        by_blocks(model, data, Store(), sensitivity=True)


def test_data_that_reach_no_layer_are_refused():
    model, data = made()
    unused = nn.Linear(4, 4)
    model.unused = unused
    layers = [layer for layer in decomposable(find_layers(model)) if layer.name == "unused"]
    for sensitivity in (False, True):
        with pytest.raises(ArgumentError, match="data= reaches none of the layers"):
            by_blocks(model, data, Store(), layers, sensitivity=sensitivity)


def test_masks_that_fit_nothing_are_said():
    model, data = made()
    other = [{**batch, "attention_mask": torch.ones(3, 9)} for batch in data]
    with pytest.warns(UserWarning, match="the masks of data= fit the input of no layer"):
        by_blocks(model, other, Store(), sensitivity=True)
    assert alds.analyze(model, data=data, held_out=0).moments["stem"].rows == 45
