"""``alds-fast eval``, in processes of its own and in this one."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import alds_fast
from alds_fast.cli import main

MODEL = """
import os
import time
import torch
from alds_fast.layers import count_params as count
from torch import nn

class Net(nn.Sequential):
    pass

def build(seed):
    torch.manual_seed(seed)
    return Net(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False))

def one():
    return build(0)

def quality(model):
    assert isinstance(model, Net)
    return count(model) / 1280

def waits(model):
    share = quality(model)
    while share < 1 and not os.path.exists("go"):
        time.sleep(0.05)
    return share

def retrained(model):
    return model

def broken(model):
    raise ValueError("this quality is broken")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "evaluated.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("evaluated", None)


def _start(*args):
    command = [sys.executable, "-m", "alds_fast", "eval", *args]
    environment = {**os.environ, "PYTHONPATH": str(Path(alds_fast.__file__).parent.parent)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip


@pytest.mark.slow
def test_end_to_end_with_workers(folder):
    args = "evaluated.py:build", "--quality", "evaluated.py:quality", "--params", "0.5,0.3", "--p", "inf,4"
    args += "--criteria", "frobenius,operator", "--seeds", "0,1", "--input", "2,32", "--out", "results"
    process = _start(*args, "--workers", "2")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    for text in ("### params = 0.5", "### params = 0.3", "| alds frobenius p=inf | ", "| alds operator p=4 | "):
        assert text in out
    assert out.rstrip() == (folder / "results/table.md").read_text().rstrip()
    data = json.loads((folder / "results/results.json").read_text())
    assert len(data["rows"]) == 2 * 2 * 2 * 2 and all(r["quality"] == r["params"] for r in data["rows"])
    assert len((folder / "results/results.csv").read_text().splitlines()) == 17
    if importlib.util.find_spec("matplotlib"):
        assert (folder / "results/quality_flops.png").stat().st_size > 10_000


@pytest.mark.slow
def test_interrupted_and_run_again(folder, capsys):
    args = "evaluated.py:one", "--quality", "evaluated.py:waits", "--params", "0.5,0.3", "--out", "results"
    process = _start(*args, "--workers", "2")
    try:
        until, path = time.monotonic() + 200, folder / "results/results.jsonl"
        while not path.is_file() or len(path.read_text().splitlines()) < 2:  # the dense model, then both wait
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == (
        "alds-fast: what is finished is in results; the same command goes on from there\nalds-fast: interrupted\n"
    )
    (folder / "go").touch()
    assert main(["eval", *args, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [r["status"] for r in data["rows"]] == ["done", "done"]
    assert len(path.read_text().splitlines()) == 2 + 1 + 2  # two runs began; dense once, two cells


def test_options_of_the_analysis_and_retraining(folder, capsys):
    args = "evaluated.py:one", "--quality", "evaluated.py:quality", "--flops", "0.4", "--input", "2,32"
    args += "--after", "evaluated.py:retrained", "--groups", "1", "--schemes", "0", "--exclude", "2", "--json"
    assert main(["eval", *args]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    # layer 2 stays: rank r of the other costs r (64 - r) and 32 indices, of which 8 + 32 are within .4 - 256 / 1280
    assert row["quality_after"] == row["quality"] == (256 + 4 * (64 - 4) + 32) / 1280 and row["budget"] == "flops"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--quality", "evaluated.py", "--params", "0.5"], "'evaluated.py': expected package.module:function"),
        (["--quality", "evaluated.py:none", "--params", "0.5"], "'evaluated.py' has no 'none'; its functions are "),
        (["--quality", "evaluated.py:quality", "--flops", "0.5"], "--flops needs --input"),
        (["--quality", "evaluated.py:quality", "--params", "0"], "0.0 is outside (0, 1]"),
        (["--quality", "evaluated.py:quality", "--params", "0.5", "--methods", "magic"], "'magic' is not one of"),
        (["--quality", "evaluated.py:broken", "--params", "0.5"], "the first is 'dense', share 1, seed 0: ValueError"),
    ],
)
def test_refusals(folder, capsys, args, message):
    assert main(["eval", "evaluated.py:one", *args]) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", "evaluated.py:one", "--quality", "evaluated.py:quality"])
    assert os.listdir(folder) != []
