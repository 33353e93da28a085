"""Runs that begin at the end of a block give what whole runs give."""

import itertools

import pytest
import torch
from torch import nn

from alds_fast.blocks import Walk, check_lists, find_blocks, find_chain
from alds_fast.blocks import states as states_module
from alds_fast.blocks.states import Room, blank, keep, restored
from alds_fast.errors import ArgumentError
from alds_fast.measurement import private_runs


class Residual(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, scale=1.0):
        return x + scale * self.second(self.first(x).relu())


class Tower(nn.Module):
    """An embedding, blocks that share an argument, something between two of them, and a head."""

    def __init__(self, depth=4):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(10, 6), nn.ModuleList(Residual() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 10)

    def forward(self, ids):
        x = self.embed(ids)
        scale = (ids > 3).float().unsqueeze(-1)
        for i, block in enumerate(self.blocks):
            x = self.norm(block(x, scale=scale)) if i == 1 else block(x, scale=scale)
        return {"logits": self.head(x)}


class Skipping(Tower):
    """Its third block reads what the first has returned."""

    def forward(self, ids):
        first = x = self.blocks[0](self.embed(ids))
        for block in self.blocks[1:]:
            x = block(x + first)
        return self.head(x)


class TwoLists(nn.Module):
    """An encoder that every block of a decoder reads."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList(Residual() for _ in range(2))
        self.decoder = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x, y):
        for block in self.encoder:
            x = block(x)
        for block in self.decoder:
            y = block(y, scale=x.tanh())
        return y


def tower(kind=Tower, **options):
    torch.manual_seed(0)
    return kind(**options).eval()


IDS = torch.arange(20).reshape(2, 10) % 10


def chain_of(model, *inputs):
    with private_runs(model) as run:
        return find_chain(model, run, [(1, inputs)], "inputs")


def test_blocks_are_members_of_lists_that_are_made_of_modules():
    assert find_blocks(tower()) == [f"blocks.{i}" for i in range(4)]
    nested = nn.Sequential(
        nn.Linear(6, 6), nn.Sequential(Residual(), nn.ReLU(), Residual()), nn.ModuleList([Residual()])
    )
    assert find_blocks(nested) == ["1.0", "1.2", "2.0"]
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []
    assert find_blocks(nn.Sequential(tower(), nn.ReLU())) == [f"0.blocks.{i}" for i in range(4)]


def test_compiled_and_scripted_blocks_cannot_be_skipped():
    model = tower()
    model.blocks[0].compile()
    model.blocks[1] = torch.jit.trace(model.blocks[1], torch.zeros(2, 6))
    assert find_blocks(model) == ["blocks.2", "blocks.3"]


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["in files", "in memory"])
def test_every_block_returns_the_same_bits_from_every_position(limit, monkeypatch):
    monkeypatch.setattr(states_module, "MEMORY", limit)
    model, batches = tower(), [(1, (IDS,)), (2, ((IDS + 1) % 10,))]
    seen = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, a, y, i=i: seen.setdefault(i, []).append(y))
    with private_runs(model) as run:
        want = [run(batch, number, "")["logits"] for number, batch in batches]
        whole, seen = seen, {}
        walk = Walk(model, run, [f"blocks.{i}" for i in range(4)])
        walk._room = Room(limit)
        for position in range(5):
            walk.advance(position, batches, "")
            assert all(torch.equal(walk.run(b, n, "")["logits"], w) for (n, b), w in zip(batches, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[3], seen[3][-2:], strict=True))
    assert "forward" not in vars(model.blocks[0])


def test_blocks_before_the_position_are_not_run():
    model, calls = tower(), []
    for i, block in enumerate(model.blocks):
        block.first.register_forward_hook(lambda *_, i=i: calls.append(i))
    with private_runs(model) as run:
        walk = Walk(model, run, [f"blocks.{i}" for i in range(4)])
        walk.advance(3, [(1, (IDS,))], "")
        assert calls == [0, 1, 2]
        calls.clear()
        walk.run((IDS,), 1, "")
    assert calls == [3]


def test_hooks_on_blocks_count_once():
    model = tower()
    model.blocks[1].register_forward_hook(lambda m, a, y: 2 * y)
    assert chain_of(model, IDS).blocks == tuple(f"blocks.{i}" for i in range(4))


def test_an_instance_s_own_forward_is_put_back():
    model = tower()
    own = model.blocks[0].forward
    model.blocks[0].forward = own
    assert len(chain_of(model, IDS).blocks) == 4
    assert model.blocks[0].forward is own


def test_what_is_no_chain_is_told_why():
    assert "depends on more" in chain_of(tower(Skipping), IDS).reason
    assert "2 modules that look like blocks" in chain_of(tower(depth=2), IDS).reason
    shared = tower()
    shared.blocks = nn.ModuleList([shared.blocks[0]] * 4)
    assert "called once" in chain_of(shared, IDS).reason or "look like blocks" in chain_of(shared, IDS).reason


def test_decoders_read_what_the_encoder_has_returned():
    model, x, y = tower(TwoLists), torch.randn(2, 6), torch.randn(2, 6)
    chain = chain_of(model, x, y)
    assert chain.blocks == ("encoder.0", "encoder.1", "decoder.0", "decoder.1", "decoder.2")
    assert chain.ends == ("encoder.1",)


def test_blocks_that_return_caches_are_no_chain():
    class Cached(Residual):
        def forward(self, x, scale=1.0):
            return super().forward(x), object()

    class Model(Tower):
        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x, _ = block(x)
            return x

    model = tower(Model)
    model.blocks = nn.ModuleList(Cached() for _ in range(3))
    assert "returns more than tensors" in chain_of(model, IDS).reason


@pytest.mark.parametrize("limit", [0, 1 << 20], ids=["file", "memory"])
def test_kept_tensors_have_their_values_types_and_strides(limit):
    room = Room(limit)
    plain, last = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    value = (
        plain,
        {"a": last, "b": torch.arange(3), "c": None},
        torch.ones(2, 2, dtype=torch.bfloat16),
        torch.ones(3).expand(2, 3),
    )
    again = restored(keep(value, room))
    for old, new in zip(_tensors(value), _tensors(again), strict=True):
        assert torch.equal(old, new) and old.dtype == new.dtype
        assert old.stride() == new.stride() or 0 in old.stride()
    shapes = restored(blank(value))
    assert [t.shape for t in _tensors(shapes)] == [t.shape for t in _tensors(value)]
    plain.zero_()
    assert bool(restored(keep((again[0],), room))[0].any())


def _tensors(value):
    return list(itertools.chain([value[0]], [value[1]["a"], value[1]["b"]], value[2:]))


class Noting(Residual):
    seen = None

    def forward(self, x, scale=1.0):
        y = super().forward(x)
        self.seen = y.mean()
        return y


class Auxiliary(Tower):
    """Its output reads what the blocks have left behind."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Noting() for _ in range(4))

    def forward(self, ids):
        return super().forward(ids)["logits"] + sum(block.seen for block in self.blocks)


def test_models_that_read_what_blocks_leave_behind_are_no_chain():
    assert "does not run without its blocks" in chain_of(tower(Auxiliary), IDS).reason


def test_a_dependence_of_later_batches_and_of_few_places_is_found():
    class Later(Tower):
        def forward(self, ids):
            first = x = self.blocks[0](self.embed(ids))
            for block in self.blocks[1:]:
                x = block(x)
            return x + first if int(ids.max()) > 5 else x

    model = tower(Later)
    few, many = IDS % 5, IDS
    with private_runs(model) as run:
        assert find_chain(model, run, [(1, few)], "").blocks
        assert "output depends on more" in find_chain(model, run, [(1, few), (2, many)], "").reason

    class Last(Tower):
        def forward(self, x):
            first = x = self.blocks[0](x)
            for block in self.blocks[1:]:
                x = block(x)
                x = torch.cat([x[:, :-1], x[:, -1:] + first[:, -1:]], 1)
            return x

    model = tower(Last)
    model.blocks = nn.ModuleList(Residual(64) for _ in range(4))
    assert "depends on more" in chain_of(model, torch.randn(64, 128, 64)).reason


def test_batches_that_run_other_blocks_are_no_chain():
    class Optional(Tower):
        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks[: 4 if int(ids.max()) > 5 else 3]:
                x = block(x)
            return x

    model = tower(Optional)
    with private_runs(model) as run:
        assert "batch 2 runs other blocks" in find_chain(model, run, [(1, IDS), (2, IDS % 5)], "").reason


def test_blocks_in_lists_that_users_name():
    two = nn.ModuleDict({"a": tower(), "b": nn.ModuleList(), "c": nn.Linear(2, 2)})
    assert find_blocks(two, ["a.blocks"]) == [f"a.blocks.{i}" for i in range(4)]
    for name, text in (("b", "is empty"), ("c", "is no list of the model; it has a.blocks"), ("d", "no list")):
        with pytest.raises(ArgumentError, match=text):
            find_blocks(two, [name])
    assert check_lists("x, y") == check_lists(["x", "y"]) == ("x", "y") and check_lists(None) is None
    for wrong in ("", [], 3, ["x", 3], "x,,y"):
        with pytest.raises(ArgumentError, match="expected names of lists"):
            check_lists(wrong)
    model = tower()
    with private_runs(model) as run:
        assert find_chain(model, run, [(1, (IDS,))], "", ["blocks"]) == chain_of(model, IDS)
    model = tower(Skipping)
    with private_runs(model) as run, pytest.raises(ArgumentError, match="blocks='blocks' are no chain: .* depends"):
        find_chain(model, run, [(1, (IDS,))], "", ["blocks"])
