"""``alds-fast report`` on what compress has written, on two functions, and what it refuses."""

import json
import sys

import pytest

from alds_fast.cli import main

MODEL = """
import torch
from torch import nn
import alds_fast as alds

def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))

def small():
    return alds.compress(dense(), params=0.7)

def batches():
    return [(torch.zeros(4, 32), torch.zeros(4)), (torch.ones(4, 32), torch.ones(4))]

def quality(model):
    return float(model(torch.ones(1, 32)).shape[1])
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "reported.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("reported", None)


def test_of_a_file_and_its_deployed_form(folder, capsys):
    assert main(["compress", "reported.py:dense", "--params", "0.6", "-o", "small.safetensors"]) == 0
    capsys.readouterr()
    options = "--input", "4,32", "--quality", "reported.py:quality", "--rounds", "2", "--deploy", "-o", "report.md"
    assert main(["report", "reported.py:dense", "small.safetensors", *options]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["dense", "compressed", "/", "dense", "deployed", "/", "dense"]
    assert [line.split()[0] for line in printed.splitlines()[2:7]] == ["parameters", "MB", "FLOPs", "ms", "quality"]
    assert (folder / "report.md").read_text().startswith("|  | dense | compressed | / dense | deployed | / dense |")


def test_of_two_functions_on_a_batch_with_labels(folder, capsys):
    options = "--data", "reported.py:batches", "--rounds", "2", "--json"
    assert main(["report", "reported.py:dense", "reported.py:small", *options]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert (
        seen["values"]["dense"]["flops"] == 2 * 4 * (32 * 32 + 32 * 8) and seen["ratios"]["compressed"]["params"] <= 0.7
    )


def test_refusals(folder, capsys):
    assert main(["report", "reported.py:dense", "none.safetensors", "--input", "4,32"]) == 1
    assert "'none.safetensors' does not exist" in capsys.readouterr().err
    assert (
        main(["report", "reported.py:dense", "reported.py:small", "--input", "4,32", "--quality", "reported.py:q"]) == 1
    )
    assert "'reported.py' has no 'q'; its functions are " in capsys.readouterr().err
