"""Tables: low-rank ones give the rows of their product, and are decomposed where include= names them."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import alds_fast as alds
from alds_fast.layers import LowRankLayer, count_params, find_layers


def table(kind=nn.Embedding, **options):
    torch.manual_seed(0)
    return kind(40, 12, **options).double()


def ids(*shape, entries=40):
    return torch.randint(entries, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("rank", [3, 12])
def test_an_embedding_is_the_dense_one_of_its_product(rank):
    module = table(padding_idx=0)
    low = alds.LowRankEmbedding.from_dense(module, rank=rank)
    same, x = low.to_dense(), ids(3, 5)
    assert same.weight.shape == module.weight.shape == low.weight.shape and same.padding_idx == 0
    torch.testing.assert_close(low(x), same(x))
    torch.testing.assert_close(alds.to_plain(low)(x), same(x))
    assert not low(torch.tensor([0])).abs().max() > 1e-12
    if rank == 12:
        torch.testing.assert_close(low(x), module(x))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_a_bag_is_the_dense_one_of_its_product(mode):
    module = table(nn.EmbeddingBag, mode=mode, padding_idx=2, include_last_offset=True)
    low = alds.LowRankEmbeddingBag.from_dense(module, rank=4)
    same, flat, offsets = low.to_dense(), ids(9), torch.tensor([0, 4, 4, 9])
    torch.testing.assert_close(low(ids(3, 4)), same(ids(3, 4)))
    torch.testing.assert_close(low(flat, offsets), same(flat, offsets))
    if mode == "sum":
        weights = torch.rand(9, dtype=torch.float64)
        torch.testing.assert_close(low(flat, offsets, weights), same(flat, offsets, weights))


def test_gradients_reach_both_factors_and_pass_padding_by():
    low = alds.LowRankEmbedding(10, 6, rank=2, padding_idx=1)
    low(torch.tensor([1, 3])).square().sum().backward()
    assert low.decoder.grad.any() and low.encoder.grad[:, 3].any() and not low.encoder.grad[:, 1].any()


class Tagger(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.bags = nn.Embedding(40, 24), nn.EmbeddingBag(30, 24, mode="sum")
        self.body = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x):
        return self.body(self.words(x) + self.bags(x % 30)[:, None])


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"data": [ids(200, 6)], "sensitivity": True, "refit": True}, {"flops": 0.7, "example_inputs": ids(4, 6)}],
    ids=["weights", "data", "flops"],
)
@pytest.mark.filterwarnings("ignore:.*(kept aside|refit= left):UserWarning")
def test_a_model_is_compressed_saved_loaded_deployed_and_exported(options, tmp_path):
    model, x = Tagger().eval(), ids(4, 6)
    small = alds.compress(model, params=0.6, include=["*", "words", "bags"], **options)
    low = {name: m for name, m in small.named_modules() if isinstance(m, LowRankLayer)}
    assert count_params(small) == small.alds_plan.params <= 0.6 * count_params(model)
    assert {"words", "bags"} & low.keys()
    alds.save(small, tmp_path / "small.st")
    assert torch.equal(alds.load(tmp_path / "small.st", Tagger(1).eval())(x), small(x))
    torch.testing.assert_close(alds.deploy(small, x, rounds=1)(x), small(x))
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), small(x))
    if "flops" in options:
        counts = []
        for net in (model, small):
            with FlopCounterMode(display=False) as counter:
                net(x)
            counts.append(counter.get_total_flops())
        assert counts[1] <= 0.7 * counts[0]
    again = alds.compress(small, params=0.8, include=list(low))
    assert count_params(again) <= 0.8 * count_params(small)


@torch.no_grad()
def test_the_error_is_that_of_the_table_or_of_its_rows_in_the_data():
    model = nn.Sequential(table())
    plan = alds.analyze(model, include="0").plan(params=0.5)
    small = plan.apply(model)
    lost = small[0].dense_weight().mT - model[0].weight
    assert float(lost.norm() / model[0].weight.norm()) == pytest.approx(plan.layers[0].error, rel=1e-6)
    data = ids(500, 4, entries=8)  # eight of the rows are ever looked up
    seen = alds.compress(model, params=0.5, include="0", data=[data], criterion="output", held_out=0)
    without, with_data = (float((net(data) - model(data)).norm() / model(data).norm()) for net in (small, seen))
    assert with_data < 0.9 * without


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(40, 12), 'include=["*", "Embedding*"] decomposes it'),
        (nn.Embedding(40, 12, max_norm=1.0), "max_norm="),
        (nn.Embedding(40, 12, sparse=True), "sparse"),
        (nn.EmbeddingBag(40, 12, mode="max"), "mode='max'"),
    ],
)
def test_what_is_left_out_says_why(module, reason):
    assert reason in alds.analyze(nn.Sequential(module)).layers[0].reason
    if "include" in reason:
        assert find_layers(module)[0].reason is None
    for options in ({"groups": 2}, {"scheme": 3}, {"pivots": "output"}):
        with pytest.raises(alds.AldsError, match="a table has scheme=0"):
            alds.LowRankEmbedding(40, 12, 3, **options)
