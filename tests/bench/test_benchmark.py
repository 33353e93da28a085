"""Benchmarks of layers and models. No timing decides a test."""

import dataclasses
import importlib.util
import json

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast import bench
from alds_fast.bench import api, timing
from alds_fast.cli.commands import main
from alds_fast.errors import ArgumentError, MissingFileError
from alds_fast.kernels import lowrank_linear

QUICK = {"rounds": 2, "compile": False, "device": "cpu"}
MODULE = """
import torch
from torch import nn


def net():
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def mine(x, encoder, decoder, bias, groups):
    return torch.nn.functional.linear(x, decoder @ encoder, bias)
"""


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    """The device's limits from small copies and products, seconds less each."""
    monkeypatch.setattr(api, "ceilings", lambda device, quick, dtype: timing.ceilings(device, True, dtype))


@pytest.fixture
def functions():
    """What is registered in a test is taken out after it."""
    yield
    for name in ("mine", "wrong", "broken"):
        for op in ("linear", "conv"):
            bench.register(name, None, op)


def test_a_linear_layer_has_a_row_for_every_number_of_rows_and_rank():
    seen = alds.benchmark(linear=(24, 32), rows=(1, 5), rank=(3, 8), groups=2, bias=True, **QUICK)
    assert [row["name"] for row in seen.rows] == [
        f"linear 24->32 m{m} q{q} g2 float32" for q in (6, 16) for m in (1, 5)
    ]
    for row in seen.rows:
        assert row["gains"]["dense"] == [1.0, 1.0, 1.0] and row["two_op_ms"] > 0 and row["errors_ok"]
        assert row["errors"]["two_op"] < 1e-5 and row["roofline_ms"] > 0
        assert row["interpreted"] or "CUDA" in row["reasons"]["fused"]
    text = str(seen)
    assert "two calls" in text and "speed-up" in text and "no two calls, compiled" in text
    assert repr(seen) == "<Benchmark of 4 cases; print() has the table>"


@pytest.mark.parametrize("scheme", [0, 3])
def test_a_convolution(scheme):
    seen = alds.benchmark(conv=(4, 6, 5), rank=2, image=3, batch=1, groups=2, scheme=scheme, **QUICK)
    (row,) = seen.rows
    assert row["error"] is None and ("padded" in row["gains"]) == (scheme == 0)
    assert row["op"] == "conv5x5" and row["errors"]["two_op"] < 1e-5 and row["errors"]["dense"] < 1e-5
    taps = (1, 25) if scheme == 3 else (25, 1)
    assert row["flop_reduction"] == pytest.approx(25 * 4 * 6 / (4 * (2 * taps[0] + 6 * taps[1])))


def test_torch_compile_is_one_of_the_ways():
    (row,) = alds.benchmark(linear=(16, 16), rows=3, rank=2, rounds=2, device="cpu").rows
    assert row["compiled_ms"] > 0 and row["errors"]["compiled"] < 1e-5


def test_functions_of_users_take_turns_and_are_judged(functions):
    def mine(x, encoder, decoder, bias, groups):
        return lowrank_linear(x, encoder, decoder, bias, groups=groups, backend="two-op")

    def broken(x, encoder, decoder, bias, groups):
        raise ValueError("not today")

    bench.register("mine", mine)
    bench.register("wrong", lambda x, *args, groups: torch.zeros_like(x))
    bench.register("broken", broken)
    bench.register("mine", mine, "conv")
    seen = alds.benchmark(linear=(16, 16), rows=3, rank=2, **QUICK)
    (row,) = seen.rows
    assert row["errors"]["mine"] < 1e-5 and row["errors"]["wrong"] == pytest.approx(1.0)
    assert "not today" in row["reasons"]["broken"] and "broken_ms" not in row
    assert "no broken" in str(seen) and "mine" in row["gains"]
    for name in ("mine", "wrong", "broken"):
        bench.register(name, None)
    assert "mine" not in alds.benchmark(linear=(16, 16), rows=3, rank=2, **QUICK).rows[0]["gains"]


REFUSED = [
    (lambda y, x: None, "it returns a NoneType, expected (3, 16)"),
    (lambda y, x: (y, y), "it returns a tuple"),
    (lambda y, x: y[:1], "it returns (1, 16) of torch.float32 on cpu, expected (3, 16)"),
    (lambda y, x: y.double(), "of torch.float64 on cpu, expected (3, 16) of torch.float32"),
    (lambda y, x: (x.zero_(), y)[1], "it changes its inputs"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSED)
def test_what_a_function_spoils_is_its_own_row(spoil, message, functions):
    bench.register("mine", lambda x, e, d, b, groups: spoil(x @ (d @ e).mT, x))
    seen = alds.benchmark(linear=(16, 16), rows=3, rank=2, **QUICK)
    (row,) = seen.rows
    assert message in row["reasons"]["mine"] and "mine" not in row["gains"] and row["errors_ok"]
    assert row["errors"]["two_op"] < 1e-5 and row["two_op_ms"] > 0 and f"no mine: {row['reasons']['mine']}" in str(seen)


class Casts(nn.Module):
    """Computes in float32, whatever it is given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return self.layer(x.float())


class Counts(nn.Sequential):
    """Returns integers."""

    def forward(self, x):
        return super().forward(x).argmax(-1)


@pytest.mark.parametrize("model", [Casts(), Counts(nn.Linear(16, 16))])
def test_a_model_that_float64_says_nothing_of(model):
    seen = alds.benchmark(model=model, example_inputs=torch.ones(2, 16), params=0.6, rounds=2, compile=False)
    assert set(seen.rows[0]["gains"]) == {"dense", "two_op", "deployed"} and not seen.rows[0]["errors"]
    assert "no errors against float64: " in str(seen)


def test_what_cannot_be_registered_is_refused():
    for name, function, op, message in (
        ("dense", len, "linear", "none of dense, two_op"),
        ("", len, "linear", "expected a word"),
        ("mine", 3, "linear", "cannot be called"),
        ("mine", len, "attention", "neither 'linear' nor 'conv'"),
        ("mine", len, ["linear"], "neither 'linear' nor 'conv'"),
        ("a | b", len, "linear", "expected a word"),
    ):
        with pytest.raises(ArgumentError, match=message):
            bench.register(name, function, op)


def test_a_whole_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Dropout())
    before = torch.get_rng_state()
    seen = alds.benchmark(model=model, example_inputs=torch.ones(2, 3, 6, 6), params=0.6, rounds=2, compile=False)
    (row,) = seen.rows
    assert set(row["gains"]) == {"dense", "two_op", "deployed"} and row["name"] == "Sequential"
    assert max(row["errors"].values()) < 1e-5 and row["flop_reduction"] > 1
    assert model.training and torch.equal(torch.get_rng_state(), before)


BAD = [
    ({}, "give one of linear=, conv= and model="),
    ({"linear": (4, 4), "conv": (4, 4, 3), "rank": 1}, "give one of"),
    ({"linear": (4, 4)}, "need rank="),
    ({"linear": (4,), "rank": 1}, r"expected \(in_features, out_features\)"),
    ({"linear": "4,4", "rank": 1}, r"expected \(in_features, out_features\)"),
    ({"linear": (4, 4), "rank": 5}, "rank=5 is more than the largest rank of linear 4->4 m1 q5 float32, 4"),
    ({"linear": (4, 4), "rank": 0}, "rank=0: expected an integer >= 1"),
    ({"linear": (4, 4), "rank": []}, r"rank=\[\]: expected an integer >= 1"),
    ({"linear": (4, 4), "rank": b"a"}, "rank=b'a': expected an integer >= 1"),
    ({"linear": (4, 4), "rank": torch.ones(2)}, "rank=tensor.*: expected an integer >= 1"),
    ({"linear": (4, 4), "rank": 1, "bias": "no"}, "bias='no' is neither True nor False"),
    ({"linear": (4, 4), "rank": 1, "device": []}, r"device=\[\]"),
    ({"conv": (4, 4, 3), "rank": 1, "scheme": 0.0}, "scheme=0.0 is neither 0"),
    ({"linear": (4, 4), "rank": 1, "groups": 3}, "groups=3 does not divide the 4 channels"),
    ({"linear": (4, 4), "rank": 1, "rows": ()}, r"rows=\(\): expected an integer >= 1, or several"),
    ({"linear": (4, 4), "rank": 1, "scheme": 0}, "scheme= does not go with linear="),
    ({"linear": (4, 4), "rank": 1, "params": 0.5}, "params= does not go with linear="),
    ({"conv": (4, 4, 2), "rank": 1}, "a kernel of 2 does not keep the size"),
    ({"conv": (4, 4, 3), "rank": 1, "scheme": 1}, "scheme=1 is neither 0"),
    ({"linear": (4, 4), "rank": 1, "dtype": torch.float64}, "dtype=torch.float64 is not one of"),
    ({"linear": (4, 4), "rank": 1, "device": "meta"}, "device='meta': expected 'cpu'"),
    ({"linear": (4, 4), "rank": 1, "device": "nowhere"}, "device='nowhere'"),
    ({"linear": (4, 4), "rank": 1, "rounds": 1}, "rounds=1 is not an integer >= 2"),
    ({"linear": (4, 4), "rank": 1, "compile": 1}, "compile=1 is neither True nor False"),
    ({"model": nn.Linear(4, 4)}, "model= needs example_inputs="),
    ({"model": nn.Linear(4, 4), "rank": 1}, "rank= does not go with model="),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        alds.benchmark(**options)


def test_it_is_written(tmp_path):
    seen = alds.benchmark(linear=(16, 16), rows=3, rank=2, **QUICK)
    for ending in (".json", ".md", ".png"):
        if ending != ".png" or importlib.util.find_spec("matplotlib"):
            seen.save(tmp_path / f"seen{ending}")
            assert (tmp_path / f"seen{ending}").stat().st_size > 100
    kept = json.loads((tmp_path / "seen.json").read_text())
    assert (kept["format"], kept["rows"][0]["name"]) == ("alds_fast.bench", seen.rows[0]["name"])
    assert "| linear 16->16 m3 q2 float32 | dense |" in (tmp_path / "seen.md").read_text()
    with pytest.raises(ArgumentError, match=r"does not end in \.md"):
        seen.save(tmp_path / "seen.txt")
    with pytest.raises(MissingFileError):
        seen.save(tmp_path / "nowhere" / "seen.json")


def test_what_the_interpreter_ran_has_no_time_and_what_is_wrong_is_said():
    (row,) = alds.benchmark(linear=(16, 16), rows=3, rank=2, **QUICK).rows
    row |= {"interpreted": True, "fused_ms": 1.0, "errors_ok": False}
    for told, value in (("quantiles", [1.0, 1.0]), ("gains", [0.1, 0.1, 0.1]), ("errors", 0.5)):
        row[told] = row[told] | {"fused": value}
    text = str(dataclasses.replace(alds.benchmark(linear=(16, 16), rows=3, rank=2, **QUICK), rows=(row,)))
    (line,) = [line for line in text.splitlines() if "interpreted" in line]
    assert "0.10" not in line and "WRONG: linear 16->16" in text


def test_the_command(tmp_path, monkeypatch, capsys, functions):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.py").write_text(MODULE)
    quick = ["--rounds", "2", "--no-compile", "--out", "seen.json"]
    layer = ["--linear", "16,16", "--rows", "2", "--rank", "3", "--device", "cpu", "--kernel", "mine=here.py:mine"]
    assert main(["bench", *layer, *quick]) == 0
    assert "mine" in capsys.readouterr().out
    assert {p.name for p in tmp_path.glob("seen.*")} >= {"seen.json", "seen.md"}
    assert main(["bench", "--model", "here.py:net", "--input", "2,16", *quick, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["op"] == "model"
    half = ["--model", "here.py:net", "--input", "2,16", "--device", "cpu", "--dtype", "bfloat16", *quick, "--json"]
    assert main(["bench", *half]) == 0
    assert json.loads(capsys.readouterr().out)["conditions"]["dtype"] == "bfloat16"
    (tmp_path / "folder.md").mkdir()
    for wrong, message in (
        (["--linear", "16,16"], "need rank="),
        (["--model", "here.py:net"], "--model needs --input"),
        (["--linear", "16,16", "--rank", "2", "--weights", "x"], "--weights goes with --model"),
        (["--linear", "16,16", "--rank", "2", "--input", "1,2"], "--input goes with --model"),
        (["--model", "here.py:net", "--input", "2,16", "--device", "nowhere"], "--device nowhere"),
        (["--linear", "16,16", "--rank", "2", "--out", "nowhere/seen"], "does not exist; create it first"),
        (["--linear", "16,16", "--rank", "2", "--out", "folder"], "is a directory"),
    ):
        assert main(["bench", *wrong]) == 1
        assert message in capsys.readouterr().err


def test_without_matplotlib_numbers_and_table_are_written(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else found(name, *a))
    name = str(tmp_path / "seen")
    layer = ["--linear", "16,16", "--rows", "2", "--rank", "3", "--device", "cpu", "--rounds", "2", "--no-compile"]
    assert main(["bench", *layer, "--out", name]) == 0
    assert "no picture: plots need matplotlib" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"seen.json", "seen.md"}
