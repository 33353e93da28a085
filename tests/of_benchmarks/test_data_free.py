"""The table of plans without data: its networks, its cells, and that it goes on where it stopped. No downloads."""

import pytest
import torch
from torch import nn

import alds_fast as alds
from benchmarks.quality import architectures, data_free
from benchmarks.quality.networks import NETWORKS, Network


@pytest.mark.parametrize(
    "build, channels, size, params",
    [(architectures.CifarResNet20, 3, 32, 269_722), (architectures.resnet18, 1, 32, 11_175_370)],
)
def test_the_two_networks(build, channels, size, params):
    model = build().eval()
    assert sum(p.numel() for p in model.parameters()) == params
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 10)


def test_what_no_package_ships_is_left_out_with_the_reason(tmp_path):
    for folder in (None, tmp_path):
        assert "--data" in data_free.networks(folder)["resnet20-cifar10"].missing()
    more = {"resnet20-cifar10", "resnet18", *(f"resnet18-digits-{seed}" for seed in range(3))}
    assert data_free.networks(None).keys() == NETWORKS.keys() - {"crepe-full"} | more


def tiny(layers, asked):
    model = nn.Sequential(*layers).eval()
    x = torch.zeros(1, 3, 6, 6)

    def quality(small):
        asked.append(small)
        return float(sum(p.numel() for p in small.parameters())) / 1e6

    return Network("tiny", "", lambda seed: model, quality, lambda seed: [], x, ())


def test_cells_are_kept_and_not_run_again():
    asked, known = [], {}
    network = tiny([nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 10)], asked)
    data_free.run(network, known, known.__setitem__)
    names = {variant for _, budget, variant in known if budget == "FLOPs .5"}
    assert names == data_free.variants().keys() and known["tiny", "", "dense"] > 0
    assert {v for _, budget, v in known if budget == "params .3"} == set(data_free.FEW)
    done = len(asked)
    data_free.run(network, known, known.__setitem__)
    assert len(asked) == done == len(known)
    text = "\n".join(data_free.tables(known, ["tiny"])) + data_free.summary(known)
    assert "## FLOPs .5" in text and "in 0 of 4 cells" in text


def test_the_default_of_the_table_is_that_of_the_library():
    options, constants = data_free.variants()[data_free.DEFAULT]
    plan = alds.analyze(nn.Sequential(nn.Conv2d(8, 8, 3))).plan(params=0.5)
    assert constants == plan.keeps_constants and options["p"] == plan.p


def test_what_has_only_linear_layers_is_measured_once():
    asked, known = [], {}
    data_free.run(tiny([nn.Flatten(), nn.Linear(108, 20), nn.Linear(20, 10)], asked), known, known.__setitem__)
    assert len(asked) < len(known)
    assert known["tiny", "FLOPs .5", "p=4"] == known["tiny", "FLOPs .5", "p=4, constants"]
