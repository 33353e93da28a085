"""Layers named by name, by pattern and by class, in every option that takes them."""

import pytest
import torch
from support.models import small_net
from torch import nn

import alds_fast as alds
from alds_fast.errors import ArgumentError, LayerNotFoundError
from alds_fast.selection import ModuleNames, patterns


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(self.conv1(x).relu())


class Wide(nn.Linear):
    pass


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Wide(8, 32), nn.Linear(32, 32)),
    ).eval()


ALL = {"0", "1.conv1", "1.conv2", "2.conv1", "2.conv2", "5", "6"}
MEANT = [
    ("1.conv1", {"1.conv1"}),
    ("*.conv2", {"1.conv2", "2.conv2"}),
    ("1", {"1.conv1", "1.conv2"}),
    ("[12]", {"1.conv1", "1.conv2", "2.conv1", "2.conv2"}),
    (nn.Linear, {"5", "6"}),
    (Wide, {"5"}),
    ("Linear", {"5", "6"}),
    ("Block", {"1.conv1", "1.conv2", "2.conv1", "2.conv2"}),
    (Block, {"1.conv1", "1.conv2", "2.conv1", "2.conv2"}),
    (["0", nn.Linear], {"0", "5", "6"}),
    (nn.Sequential, ALL),
]


@pytest.mark.parametrize(("selection", "meant"), MEANT)
def test_include_and_exclude_mean_the_same_layers(selection, meant):
    model = net()
    included = {layer.name for layer in alds.analyze(model, include=selection).layers if layer.reason is None}
    excluded = {layer.name for layer in alds.analyze(model, exclude=selection).layers if layer.reason is not None}
    assert included == excluded == meant


@pytest.mark.parametrize(("selection", "meant"), [case for case in MEANT if not isinstance(case[0], list)])
def test_importance_means_them_too(selection, meant):
    analysis = alds.analyze(net())
    plan = analysis.plan(params=0.8, importance={selection: 0.0})
    assert plan == analysis.plan(params=0.8, importance=dict.fromkeys(meant, 0.0))
    assert {row.name for row in plan.layers if row.rank is not None and row.error == 0.0} <= meant


def test_of_several_patterns_the_last_counts():
    analysis = alds.analyze(net())
    both = analysis.plan(params=0.8, importance={"[12]": 5.0, "1.conv1": 1.0})
    assert both == analysis.plan(params=0.8, importance={"1.conv2": 5.0, "2": 5.0})


def test_what_means_no_layer_is_refused_with_names_that_are_near():
    with pytest.raises(
        LayerNotFoundError, match=r"exclude='1\.conv' matches no layer, neither by name nor by class.*1.conv"
    ):
        alds.analyze(net(), exclude="1.conv")
    deep = nn.ModuleDict({"layer1": net(), "layer2": net()})
    with pytest.raises(LayerNotFoundError, match="exclude='laye1' matches no layer.*'layer1'"):
        alds.analyze(deep, exclude="laye1")
    with pytest.raises(LayerNotFoundError, match="include='torch.nn.modules.conv.Conv1d' matches no layer"):
        alds.analyze(net(), include=nn.Conv1d)
    with pytest.raises(LayerNotFoundError, match="importance='7' matches no layer"):
        alds.analyze(net()).plan(params=0.5, importance={"7": 1.0})
    with pytest.raises(ArgumentError, match="exclude=.*expected a name pattern or several, or classes of modules"):
        alds.analyze(net(), exclude=[int])
    with pytest.raises(ArgumentError, match="importance=.*expected a name pattern"):
        alds.analyze(net()).plan(params=0.5, importance={3: 1.0})


def test_a_model_that_is_one_layer_has_the_empty_name():
    model = nn.Linear(16, 16)
    assert (
        ModuleNames(model).means("*", "")
        and ModuleNames(model).means("Linear", "")
        and not ModuleNames(model).means("0", "")
    )
    assert alds.analyze(model, exclude=nn.Linear).layers[0].reason == "matched by exclude="


def test_classes_become_texts_and_nothing_stays_nothing():
    assert patterns(None, "exclude") is None and patterns("a", "exclude") == ("a",)
    assert patterns((Wide,), "exclude") == (f"{__name__}.Wide",)
    assert not ModuleNames(small_net()).means("Module", "0")  # what all are says nothing
