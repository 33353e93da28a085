"""``alds-fast tune``, on a machine without a GPU; the search itself is tested in tests/tuning."""

import json

import pytest
import torch

import alds_fast as alds
from alds_fast.cli import commands
from alds_fast.cli import tune as tune_command
from alds_fast.deployment import TuningTable
from alds_fast.kernels import LinearKey, Measured, Tiling
from alds_fast.layers import LowRankLayer
from alds_fast.tuning import TunedRow

MODEL = "import torch\ndef model(): return torch.nn.Sequential(torch.nn.Linear(64, 48))\n"
KEY = LinearKey(torch.bfloat16, 64, 64, 48, 16, 1, False, True, False, None, True, "ieee")
ROWS = (
    TunedRow("0", KEY, Measured(Tiling(64, 32, 16, 4, 3), 2.0, 3.0, 1e-3), 5, {Tiling(32, 32, 16, 4, 3): "fails"}),
    TunedRow("1", KEY._replace(rows=128), Measured(None, 4.0, 4.0, 1e-3), 6, {}),
)


@pytest.fixture
def target(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(MODEL)
    return f"{file}:model"


@pytest.fixture
def tuned(monkeypatch):
    given = []

    def tune(model, x):
        given.append((model, x))
        return TuningTable(ROWS)

    monkeypatch.setattr(tune_command, "tune", tune)
    return given


def test_the_table(target, tuned, capsys):
    assert commands.main(["tune", target, "--params", "0.5", "--input", "64,64", "--device", "cpu"]) == 0
    ((model, x),) = tuned
    assert isinstance(model[0], LowRankLayer) and x.shape == (64, 64) and x.dtype == torch.float32
    head, _, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["layer", "launch"]
    assert " ".join(first.split()) == "0 linear 3.0 2.0 1.50 rows=64 reduction=32 cols=16 num_warps=4 num_stages=3 5 1"
    assert " ".join(second.split()) == "1 linear 4.0 4.0 1.00 as guessed 6 0"


def test_a_saved_model_of_another_type_as_json(target, tuned, tmp_path, capsys):
    small = alds.compress(torch.nn.Sequential(torch.nn.Linear(64, 48)).bfloat16(), params=0.5, progress=False)
    alds.save(small, tmp_path / "small.alds")
    options = ["--saved", str(tmp_path / "small.alds"), "--dtype", "bfloat16", "--device", "cpu", "--json"]
    assert commands.main(["tune", target, "--input", "2,64", *options]) == 0
    ((model, x),) = tuned
    assert torch.equal(model[0].encoder, small[0].encoder) and x.dtype == model[0].encoder.dtype == torch.bfloat16
    first, second = json.loads(capsys.readouterr().out)
    assert (first["layer"], first["us"], first["guess_us"], first["timed"]) == ("0", 2.0, 3.0, 5)
    assert first["tiling"]["reduction"] == 32 and second["tiling"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu", "--params", "0.5", "--input", "2,64"], "tune needs a model on a CUDA device"),
        (["--device", "cpu", "--input", "2,64"], "has no low-rank layer to tune: give --saved FILE, or --params"),
        (["--device", "cpu", "--params", "0.5"], "needs --input, the shape of its input"),
        (["--device", "cpu", "--params", "0.5", "--saved", "x", "--input", "2,64"], "leave out --params"),
        (["--device", "cpu", "--saved", "missing.alds", "--input", "2,64"], "missing.alds"),
        (["--device", "other", "--params", "0.5", "--input", "2,64"], "--device other"),
    ],
)
def test_errors(target, options, message, capsys):
    assert commands.main(["tune", target, *options]) == 1
    assert message in capsys.readouterr().err
