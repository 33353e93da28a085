import subprocess
import sys

import pytest
import torch
from support.marks import slow
from support.models import count, images
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from alds_fast.allocation import filter_threshold
from alds_fast.allocation.baselines import filter_pruning
from alds_fast.errors import ArgumentError, BudgetError, ModelError
from benchmarks.common.networks import Bottleneck


def by_hand():
    """2 -> 4 -> 3 -> 2, the first layer's rows of norms 4, 1, 3, 2 and the second's of 10, 20, 1.5."""
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    for module, norms in ((model[0], (4, 1, 3, 2)), (model[2], (10, 20, 1.5))):
        module.weight.data.zero_()[:, 0] = torch.tensor(norms)
        module.bias.data.copy_(torch.tensor(norms))
    return model


# 12 + 15 + 8 = 35 parameters; a filter of the first layer is 3 of its own and one of every filter of the second, a
# filter of the second 1 + the first's and 2 of the last.
# Thresholds 0: 35. 1: first 4 -> 3, 29. 1.5: second 3 -> 2, 9 + 8 + 6 = 23. 2: first 3 -> 2, 6 + 6 + 6 = 18.
#   3: first 2 -> 1, 3 + 4 + 6 = 13. 10: second 2 -> 1, 3 + 2 + 4 = 9; 4 and 20 stay, the last of their layers.
# Uniform shares 1/4: first 3, 29. 1/3: second 2, 23. 1/2: first 2, 18. 2/3: second 1 (the filter of norm 20),
#   6 + 3 + 4 = 13. 3/4: first 1, 3 + 2 + 4 = 9.
@pytest.mark.parametrize(
    ("scope", "budget", "size", "first", "second"),
    [
        ("global", 35, 35, [4, 1, 3, 2], [10, 20, 1.5]),
        ("global", 34, 29, [4, 3, 2], [10, 20, 1.5]),
        ("global", 23, 23, [4, 3, 2], [10, 20]),
        ("global", 22, 18, [4, 3], [10, 20]),
        ("global", 13, 13, [4], [10, 20]),
        ("global", 9, 9, [4], [20]),
        ("uniform", 29, 29, [4, 3, 2], [10, 20, 1.5]),
        ("uniform", 17, 13, [4, 3], [20]),
        ("uniform", 12, 9, [4], [20]),
    ],
)
def test_thresholds_by_hand(scope, budget, size, first, second):
    model = by_hand()
    small = filter_threshold(model, params=budget / 35, example_inputs=torch.ones(1, 2), scope=scope)
    assert count(small) == size and count(model) == 35
    assert small[0].bias.tolist() == first and small[2].bias.tolist() == second
    assert small[2].weight.shape == (len(second), len(first)) and small[4].weight.shape == (2, len(second))
    with pytest.raises(
        BudgetError, match=r"params=0.25 .* smallest reachable is params=0.2572, with one filter in each of 2"
    ):
        filter_threshold(model, params=0.25, example_inputs=torch.ones(1, 2), scope=scope)


def test_the_norm_decides_the_order():
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[3.0, 0, 0, 0], [2, 2, 0, 0]])  # l1 3 and 4, l2 3 and 2.83
    for norm, kept in (("l1", [2, 2, 0, 0]), ("l2", [3, 0, 0, 0])):
        small = filter_threshold(model, params=0.5, example_inputs=torch.ones(1, 4), norm=norm)
        assert small[0].weight.tolist() == [kept] and count(small) == 5


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3, 2), nn.ReLU(),
        nn.Conv2d(32, 32, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def test_removing_what_is_zero_changes_nothing():
    model = plain().eval()
    dead = torch.tensor([1, 5, 8])
    for module in (model[0], model[1]):
        module.weight.data[dead] = 0
        module.bias.data[dead] = 0
    last = torch.tensor([0, 31])
    model[5].weight.data[last], model[5].bias.data[last] = 0, 0
    # 21 of 24 and 30 of 32 filters: 3 * (27 + 1 + 2 + 32 * 9) and 2 * (32 + 1 + 4 * 10) parameters go together.
    small = filter_threshold(model, params=1 - (954 + 146) / count(model), example_inputs=images())
    assert (small[0].out_channels, small[3].out_channels, small[5].out_channels) == (21, 32, 30)
    assert torch.allclose(small(images()), model(images()), atol=1e-6)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Bottleneck(16, 4, 1), Bottleneck(16, 8, 2), Bottleneck(32, 8, 1))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.blocks(torch.relu(self.norm(self.stem(x)))).mean((2, 3))).log_softmax(-1)


class Dense(nn.Module):
    """Concatenations, as in a DenseNet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 6 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 6 * i, 6, 3, padding=1) for i in range(3))
        self.last, self.head = nn.BatchNorm2d(26), nn.Linear(26 * 4, 10)

    def forward(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(torch.relu(norm(x)))], 1)
        return self.head(nn.functional.adaptive_avg_pool2d(torch.relu(self.last(x)), 2).flatten(1))


class Attention(nn.Module):
    """The widths of query, key and value are written down in the code; those of the perceptron are not."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 5)

    def forward(self, x):
        q, k, v = self.qkv(x).view(x.shape[0], -1, 3, 4, 4).permute(2, 0, 3, 1, 4)
        x = x + self.out((q @ k.transpose(-1, -2)).softmax(-1).matmul(v).transpose(1, 2).reshape(x.shape[0], -1, 16))
        return self.head((x + self.down(torch.relu(self.up(self.norm(x))))).mean(1))


def depthwise():
    return nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 24, 1),
        nn.Flatten(), nn.Linear(24 * 100, 10),
    )  # fmt: skip


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(432, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 10)
    )


@pytest.mark.parametrize("build", [plain, Residual, Dense, depthwise, mlp])
@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("budget", ["params", slow("flops")])
def test_networks(build, scope, budget):
    torch.manual_seed(0)
    model = build()
    next(model.parameters()).requires_grad_(build is not plain)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train(build is not plain)
    small = filter_threshold(model, **{budget: 0.6}, example_inputs=images(), scope=scope)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]

    def size(m):
        if budget == "params":
            return count(m)
        with FlopCounterMode(display=False) as counter:
            m.eval()(images())
        return counter.get_total_flops()

    assert 0.4 * size(model) < size(small) <= 0.6 * size(model)
    assert small.eval()(images()).shape == (4, 10) and type(small) is type(model)
    small(images()).sum().backward()


def test_widths_in_the_code_are_left_alone():
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 7, 16)
    small = filter_threshold(model, params=0.6, example_inputs={"x": x})
    assert small.qkv.out_features == 48 and small.up.out_features == small.down.in_features < 64
    assert count(small) <= 0.6 * count(model) and small(x).shape == (2, 5)


def test_layers_that_are_left_out():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(BudgetError, match=r"params=0.5 .* smallest reachable is params=1, .* each of 0 layers"):
        filter_threshold(model, params=0.5, example_inputs=torch.ones(1, 8))
    grouped = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1))
    small = filter_threshold(grouped, params=0.8, example_inputs=images())
    assert [m.out_channels for m in small][:2] == [8, 8] and small[2].out_channels < 6 and small[3].out_channels == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, BudgetError, "give one budget, params= or flops="),
        ({"params": 0.5, "flops": 0.5}, BudgetError, "give one budget, params= or flops="),
        ({"params": 0}, BudgetError, r"params=0 is outside \(0, 1\]"),
        ({"flops": True}, BudgetError, r"flops=True is outside \(0, 1\]"),
        ({"params": 0.5, "norm": "l3"}, ArgumentError, "norm='l3' is not one of l1, l2"),
        ({"params": 0.5, "scope": "layer"}, ArgumentError, "scope='layer' is not one of global, uniform"),
        ({"params": 0.5, "example_inputs": torch.ones(1, 5)}, ModelError, "example_inputs did not run"),
        ({"params": 0.5, "example_inputs": 3}, ArgumentError, "example_inputs is a int"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        filter_threshold(by_hand(), **{"example_inputs": torch.ones(1, 2), **options})


@pytest.mark.slow
def test_without_torch_pruning(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ArgumentError, match=r"needs torch-pruning: pip install 'alds_fast\[prune\]'"):
        filter_threshold(by_hand(), params=0.5, example_inputs=torch.ones(1, 2))
    code = "import alds_fast, sys; print('torch_pruning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    assert filter_pruning.NORMS.keys() == {"l1", "l2"}
