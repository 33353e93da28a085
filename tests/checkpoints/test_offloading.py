"""Models that lie in one place and run in another. Here both are the CPU: what is "there" is a copy."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support import checkpoints
from support.killed import WITH_DATA, batches
from torch import nn

import alds_fast as alds
from alds_fast.checkpoints.with_data import mapped, offloading
from alds_fast.checkpoints.with_data.offloading import offloaded

CPU = torch.device("cpu")


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(3))
        self.seen = []

    def forward(self, x, scale=1.0):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            self.seen.append({name: t.data_ptr() for name, t in self.state_dict().items()})
        return scale * x


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return Tower().eval().requires_grad_(False)


BLOCKS = ("blocks.0", "blocks.1", "blocks.2")


def test_one_block_is_there(tower):
    home = {name: t.data_ptr() for name, t in tower.state_dict().items()}
    parameters, copied = dict(tower.named_parameters()), []
    x = torch.randn(2, 4)
    want = tower(x)
    tower.seen.clear()
    with offloaded(tower, BLOCKS, CPU, lambda: copied.append(1)):
        assert torch.equal(tower(x), want) and torch.equal(tower(x), want)
    for i, there in enumerate(tower.seen):
        away = {name for name in home if there[name] != home[name] and home[name] and "weight" in name}
        assert away == {"stem.weight", f"blocks.{i % 3}.0.weight", f"blocks.{i % 3}.1.weight"}
        assert all(there[name] != home[name] for name in home if "running" in name)
    assert len(copied) == 6
    assert {name: t.data_ptr() for name, t in tower.state_dict().items()} == home
    assert all(parameter is parameters[name] for name, parameter in tower.named_parameters())


def test_a_block_stays_until_another_one_is_run(tower):
    x, copied = torch.randn(2, 4, requires_grad=True), []
    want = torch.autograd.grad(tower.blocks[1](x).sum(), x)[0]
    with offloaded(tower, BLOCKS, CPU, lambda: copied.append(1)):
        for _ in range(3):
            assert torch.equal(torch.autograd.grad(tower.blocks[1](x).sum(), x)[0], want)
    assert copied == [1]


def test_what_is_set_meanwhile_stays(tower):
    x, new, other = torch.randn(2, 4), torch.randn(4, 4), torch.randn(4, 4)
    weight, stem = tower.blocks[0][0].weight, tower.stem.weight
    with offloaded(tower, BLOCKS, CPU):
        tower(x)
        tower.blocks[0](x)
        weight.data, stem.data = new, other
        got = tower(x)
        tower.blocks[0](x)
    assert weight.data_ptr() == new.data_ptr() and stem.data_ptr() == other.data_ptr()
    assert torch.equal(tower(x), got)


def test_after_an_error_all_is_home(tower):
    home = {name: t.data_ptr() for name, t in tower.state_dict().items()}
    with pytest.raises(RuntimeError), offloaded(tower, BLOCKS, CPU):
        tower(torch.randn(2, 5))
    assert {name: t.data_ptr() for name, t in tower.state_dict().items()} == home
    assert "forward" not in vars(tower) and "forward" not in vars(tower.blocks[0])


@pytest.fixture
def away(monkeypatch):
    """All devices are others than where the weights lie; the numbers of weights that were copied."""
    copied = []

    def bring(places, weights, own=offloading._Places.bring):
        copied.append(len(weights))
        return own(places, weights)

    monkeypatch.setattr(offloading._Places, "bring", bring)
    for module in (offloading, mapped):
        monkeypatch.setattr(module, "is_offloaded", lambda device: True)
    return copied


def small(folder):
    rows = json.loads((folder / "alds_plan.json").read_text())["layers"]
    return [row["rank"] for row in rows], load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind, options", [("deep", {"refit": True, "refine": 1}), ("llama", {"refit": True})])
def test_a_job_with_data(tmp_path, request, kind, options):
    checkpoints.make(kind, tmp_path / "dense")
    options |= {"params": 0.6, "data": batches(), **WITH_DATA}
    alds.compress_checkpoint(tmp_path / "dense", tmp_path / "here", **options)
    copied = request.getfixturevalue("away")
    done = alds.compress_checkpoint(tmp_path / "dense", tmp_path / "there", **options)
    assert copied and {"refined", "refitted"} & {report.method for report in done.factors.values()}
    (ranks, here), (others, there) = small(tmp_path / "here"), small(tmp_path / "there")
    assert ranks == others and here.keys() == there.keys()
    for name, tensor in here.items():
        assert torch.allclose(there[name], tensor, atol=1e-5), name
