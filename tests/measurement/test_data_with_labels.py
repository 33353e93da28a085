"""Loaders of inputs and labels serve wherever batches of inputs do."""

import operator

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import alds_fast as alds
from alds_fast.errors import ModelError
from alds_fast.measurement import without_labels


class Pair(nn.Module):
    """It takes two inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, a, b):
        return self.second(self.first(a).relu() + b)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()


X, Y = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)), torch.arange(64)
LOADER, INPUTS = DataLoader(TensorDataset(X, Y), 16), list(X.split(16))


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("data", [LOADER, list(LOADER), [tuple(batch) for batch in LOADER]])
def test_labels_are_left_out_everywhere(data):
    model, options = net(), {"params": 0.6, "groups": (1,)}
    small = alds.compress(model, data=INPUTS, **options, refit=True)
    assert same(small, alds.compress(model, data=data, **options, refit=True))
    plan = alds.analyze(model, data=data, sensitivity=True).plan(params=0.6)
    assert plan == alds.analyze(model, data=INPUTS, sensitivity=True).plan(params=0.6)
    assert same(plan.apply(model, refit=data), plan.apply(model, refit=INPUTS))
    trained = [alds.distill(small, model, batches, epochs=1)[0] for batches in (data, INPUTS)]
    assert same(*trained)


def test_blocks_are_refined_on_loaders_with_labels():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            return x + self.down(self.up(x).relu())

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), Block())
    options = {"params": 0.6, "groups": (1,), "refine": 1}
    smalls = [alds.compress(model, data=data, **options) for data in (LOADER, INPUTS)]
    assert same(*smalls)
    assert same(*(alds.refine(smalls[0], model, data, epochs=1)[0] for data in (LOADER, INPUTS)))


def test_iterators_are_read_once_and_lengths_are_known():
    model = net()
    once = without_labels(model, iter(LOADER))
    assert iter(once) is once and torch.equal(next(once), INPUTS[0])
    again = without_labels(model, LOADER)
    assert operator.length_hint(again) == 4 and all(map(torch.equal, again, INPUTS)) and len(list(again)) == 4
    plan = alds.analyze(model, data=iter(LOADER)).plan(params=0.6)
    assert plan == alds.analyze(model, data=INPUTS).plan(params=0.6)


def test_what_the_model_takes_stays_whole():
    pair = Pair()
    assert without_labels(pair, [(X, X), [X, X]]) == [(X, X), [X, X]]
    assert without_labels(pair, [(X, X, Y)]) == [(X, X)] and without_labels(pair, [X, {"a": X}]) == [X, {"a": X}]
    taking_any = nn.Sequential(nn.Linear(2, 2))
    taking_any.forward = lambda *values: values[0]
    assert without_labels(taking_any, [(X, Y)]) == [(X, Y)]
    plan = alds.analyze(pair, data=[(X, X, Y)]).plan(params=0.6)
    assert plan == alds.analyze(pair, data=[(X, X)]).plan(params=0.6)


class Masked(nn.Module):
    """It takes a mask of tokens, if it is given one."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(16, 16)

    def forward(self, x, attn_mask=None):
        return self.one(x) if attn_mask is None else self.one(x) * attn_mask.unsqueeze(-1)


def test_classes_are_no_mask():
    model, tokens = Masked(), X.unflatten(0, (16, 4))
    classes, mask = torch.arange(16), torch.ones(16, 4, dtype=torch.int64)
    plans = [alds.analyze(model, data=[data]).plan(params=0.6) for data in ((tokens, classes), tokens)]
    assert plans[0] == plans[1]
    for masked in ((tokens, mask), (tokens, mask[:, 0].bool()), (tokens, classes[:4]), (X, torch.ones(64).long())):
        assert without_labels(model, [masked]) == [masked]
    ids = torch.zeros(16, 4, dtype=torch.int64)
    assert without_labels(model, [(ids, classes)])[0] is ids and without_labels(model, [(ids, mask)]) == [(ids, mask)]


def test_of_labels_and_numbers_of_samples_the_inputs_are_taken():
    """A loader may give more than labels beside what the model takes."""
    same = alds.analyze(net(), data=[X]).moments
    for batch in ((X, Y, Y), [X, Y, torch.arange(len(X)), "name"]):
        found = alds.analyze(net(), data=[batch]).moments
        assert all(torch.equal(found[name].second, same[name].second) for name in same)


def test_a_dict_that_the_model_takes_itself_goes_into_a_tuple():
    class Taking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, given):
            return self.layer(given["x"])

    batch = {"x": torch.randn(64, 8)}
    with pytest.raises(ModelError, match=r"a dict holds keyword arguments: .* goes into a tuple"):
        alds.analyze(Taking(), data=[batch])
    assert alds.analyze(Taking(), data=[(batch,)]).moments["layer"].second is not None


def test_tokens_beyond_the_vocabulary_are_named():
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8))
    with pytest.raises(ModelError, match=r"index out of range in self\); are there tokens beyond the vocabulary"):
        alds.analyze(model, data=[torch.tensor([[3, 16]])])
