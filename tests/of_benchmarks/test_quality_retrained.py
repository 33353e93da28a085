"""The suite after retraining: bisection of the grid, learning rates rewound, the table of what was found."""

from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.quality import retrained, retrained_table, training
from benchmarks.quality.networks import Network


def tiny(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 2)).eval()


def batches(seed):
    x = torch.randn(8, 100, generator=torch.Generator().manual_seed(seed))
    return [(x, torch.arange(8) % 2)]


def kept_above(share, model):
    """All right as long as more than a share of the parameters is left."""
    return 1.0 if sum(p.numel() for p in model.parameters()) > share * 10_302 else 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("least", "share"), [(0.9, 1.0), (0.4, 0.5), (0.21, 0.3), (0.14, 0.2), (0.1, 0.13), (0.06, 0.08), (0.0, 0.05)]
)
def test_bisection_finds_the_smallest_share_that_keeps_the_quality(least, share, tmp_path, monkeypatch):
    recipe = training.Recipe(partial(training.sgd, lr=0.01), 4)
    network = Network(
        "tiny", "", tiny, partial(kept_above, least), lambda seed: [batches(seed)[0][0]], torch.zeros(1, 100), (),
        batches, recipe,
    )  # fmt: skip
    monkeypatch.setitem(retrained.NETWORKS, "tiny", network)
    chosen = {"a": {"p": 4.0}, "b": {"method": "svd"}}
    assert retrained.search("tiny", 0, chosen, tmp_path, 0.25)["a"] == share  # below 0.05 no rank is left
    rows, reductions = retrained_table.reductions(tmp_path)
    assert reductions["tiny", "a"] == {0: 1 - share} and len(rows) <= 1 + 2 * 3
    ended, seeds = retrained_table.complete(rows, reductions)
    assert seeds == {"tiny": [0]} and "| tiny (1) |" in retrained_table.by_variant(ended, seeds)


def test_rewinding_takes_the_last_epochs_of_the_schedule():
    recipe = training.Recipe(partial(training.sgd, lr=0.1), 4)
    loader = 5 * batches(0)
    rates = {}
    for start in (0, 3):
        log = []
        training.fit(tiny(0), loader, recipe, log.append, start)
        rates[start] = {line["epoch"]: line["lr"] for line in log}
    assert list(rates[3]) == [4] and rates[3][4] == pytest.approx(rates[0][4])
