"""Checkpoint directories compressed with data by several processes: the plan of one, resumed to the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support import checkpoints
from support.in_processes import OPTIONS
from support.killed import batches

import alds_fast as alds
from alds_fast.checkpoints.streaming import api
from alds_fast.errors import ArgumentError, ModelError
from alds_fast.processes import World

JOB = Path(__file__).parents[1] / "support" / "in_processes.py"


def torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(JOB), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A chain of blocks, and what two processes make of it."""
    folder = tmp_path_factory.mktemp("deep")
    checkpoints.make("deep", folder / "dense")
    run = torchrun(2, folder / "dense", folder / "two")
    assert run.returncode == 0, run.stderr
    return folder


def layers(folder):
    rows = json.loads((folder / "alds_plan.json").read_text())["layers"]
    return [{name: value for name, value in row.items() if name not in ("error", "held_out")} for row in rows]


@pytest.mark.slow
def test_two_come_to_what_one_comes_to(deep):
    done = alds.compress_checkpoint(deep / "dense", deep / "one", **OPTIONS)
    assert layers(deep / "two") == layers(deep / "one")
    assert {"refined", "refitted"} & {report.method for report in done.factors.values()}
    errors = [[row.error for row in alds.Plan.from_json((deep / n / "alds_plan.json").read_text()).layers]
              for n in ("one", "two")]  # fmt: skip
    assert errors[0] == pytest.approx(errors[1], rel=1e-9)
    one, two = (load_file(deep / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, atol=1e-4), name
    x = checkpoints.inputs("deep")
    with torch.no_grad():
        logits = [alds.from_pretrained(deep / name)(**x).logits for name in ("one", "two")]
    assert torch.allclose(*logits, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("rank, call, then", [(1, 9, 1), (0, 60, 2)], ids=["in moments", "in refit"])
def test_one_of_two_is_killed(deep, tmp_path, rank, call, then):
    run = torchrun(2, deep / "dense", tmp_path / "small", rank, call)
    assert run.returncode != 0 and "SIGKILL" in run.stderr and "Signal 9" in run.stderr, run.stderr
    assert not (tmp_path / "small" / "config.json").exists()
    if then == 1:  # any number goes on
        alds.compress_checkpoint(deep / "dense", tmp_path / "small", **OPTIONS)
        assert layers(tmp_path / "small") == layers(deep / "two")
        return
    run = torchrun(2, deep / "dense", tmp_path / "small")
    assert run.returncode == 0, run.stderr
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(deep / "two")


class Alone(World):
    """One of two whose other one does not come before something is refused."""

    others = None

    def tell(self, value):
        return [value, self.others or value]

    def together(self):
        pass


@pytest.fixture
def one_of_two(monkeypatch):
    class Joined:
        def __enter__(self):
            return Alone(0, 2)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(api, "join_processes", lambda device: Joined())


def test_fewer_batches_than_processes(tmp_path, one_of_two):
    checkpoints.make("deep", tmp_path / "dense")
    with pytest.raises(ArgumentError, match="data= has 1 batches for 2 processes, of which each takes one at least"):
        alds.compress_checkpoint(tmp_path / "dense", tmp_path / "small", params=0.7, data=batches(1))


def test_other_batches(tmp_path, one_of_two, monkeypatch):
    checkpoints.make("deep", tmp_path / "dense")
    monkeypatch.setattr(Alone, "others", {"data": "none"})
    with pytest.raises(
        ArgumentError, match="processes of this job are given different arguments .*data='.*' here, 'none' there"
    ):
        alds.compress_checkpoint(tmp_path / "dense", tmp_path / "small", params=0.7, data=batches(2))
    assert not (tmp_path / "small").exists()


def test_no_chain_of_blocks(tmp_path, one_of_two):
    checkpoints.make("llama", tmp_path / "dense")
    with pytest.raises(ModelError, match="data= with 2 processes needs a chain of blocks: the model has 2 modules"):
        alds.compress_checkpoint(tmp_path / "dense", tmp_path / "small", params=0.7, data=batches(2))


def test_convolutions(tmp_path, one_of_two):
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))
    model.save_pretrained(tmp_path / "dense")
    options = {"params": 0.7, "data": [{"pixel_values": torch.randn(2, 3, 32, 32)} for _ in range(2)]}
    name = r"vit\.embeddings\.patch_embeddings\.projection"
    with pytest.raises(ArgumentError, match=rf"layer '{name}' is a Conv2d.* with exclude=\['{name}'\]"):
        alds.compress_checkpoint(tmp_path / "dense", tmp_path / "small", **options)
