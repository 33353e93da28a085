import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from support.models import count, small_net

import alds_fast as alds
from alds_fast.cli import main

MODEL = """
from __future__ import annotations
import dataclasses
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2400, 10))

def broken():
    raise ValueError("this model is broken")

def nothing():
    return None

def closeness(model):
    x, dense = torch.ones(2, 3, 12, 12), net()
    return 1 - (model(x) - dense(x)).norm() / dense(x).norm()

def leaves():
    raise SystemExit(5)

@dataclasses.dataclass
class Settings:
    size: int = 3
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    (tmp_path / "my_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return f"{tmp_path}/my_model.py:net"


def _run(capsys, *args):
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_analyze_lists_the_layers(model, capsys):
    code, out, _ = _run(capsys, "analyze", model)
    assert code == 0 and "24x3x3x3" in out and "2 layers that can be factorised" in out


def test_analyze_json(model, capsys):
    code, out, _ = _run(capsys, "analyze", model, "--json", "--schemes", "0,3", "--groups", "1,2", "--exclude", "0")
    data = json.loads(out)
    assert code == 0 and data["layers"][0]["reason"] == "matched by exclude="
    assert data["layers"][1]["candidates"] == [[0, 1, 10], [0, 2, 10]]


def test_compress_writes_a_model_that_loads(model, capsys, tmp_path):
    code, out, _ = _run(capsys, "compress", model, "--params", "0.4", "-o", "small.safetensors")
    assert code == 0 and "largest frobenius error" in out and "factors: " in out and "wrote small.safetensors" in out
    namespace = {}
    exec(MODEL, namespace)
    loaded = alds.load(tmp_path / "small.safetensors", namespace["net"])
    assert count(loaded) <= 0.4 * count(namespace["net"]())


def test_compress_json_and_show(model, capsys, tmp_path):
    args = "--error", "0.5", "-o", "s.safetensors", "--p", "inf", "--align", "2", "--criterion", "operator", "--json"
    code, out, _ = _run(capsys, "compress", model, *args)
    data = json.loads(out)
    assert code == 0 and data["file_bytes"] == (tmp_path / "s.safetensors").stat().st_size and data["seconds"] > 0
    plan = alds.Plan.from_json(json.dumps(data["plan"]))
    assert plan.error <= 0.5 and plan.criterion == "operator" and plan.params == data["params"]
    code, out, _ = _run(capsys, "show", "s.safetensors")
    shown, kinds = out.split("\n\n")
    assert code == 0 and shown == str(plan)
    assert [line.split()[0] for line in kinds.splitlines()[2:]] == list(dict.fromkeys(row.kind for row in plan.layers))
    convolutions = [row for row in plan.layers if row.kind == "Conv2d"]
    before, after = (sum(getattr(row, f"params_{when}") for row in convolutions) for when in ("before", "after"))
    low = sum(row.rank is not None for row in convolutions)
    line = next(line for line in kinds.splitlines() if line.startswith("Conv2d"))
    assert line.split()[1:] == [str(len(convolutions)), str(low), f"{before:,}", f"{after:,}", f"{after / before:.1%}"]
    assert alds.Plan.from_json(_run(capsys, "show", "s.safetensors", "--json")[1]) == plan
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert _run(capsys, "show", "plan.json")[:2] == (0, out)


def test_plain_factors_and_an_input_to_run_on(model, capsys):
    options = "--params", "0.99", "--exclude", "3", "--input", "2,3,12,12", "-o", "s.safetensors", "--json"
    plans = [json.loads(_run(capsys, "compress", model, *options, *more)[1])["plan"] for more in ((), ("--no-pivots",))]
    used = [{row["pivots"] for row in plan["layers"]} for plan in plans]
    assert used[0] - {"", None} and not used[1] - {"", None}
    code, _, err = _run(capsys, "compress", model, "--params", "0.4", "--input", "2,5,12,12", "-o", "s.safetensors")
    assert code == 1 and "example_inputs did not run through the model" in err


def test_without_a_command_it_tells_which_there_are(capsys):
    code, out, err = _run(capsys)
    assert code == 2 and out == "" and "{analyze,compress,eval,report,bench,tune,show}" in err


def test_numbers_of_parameters_and_bytes(model, capsys):
    for flags, budget in (("--params", "12000"), "params=12000"), (("--memory", "50kB"), "memory=50000"):
        code, out, _ = _run(capsys, "compress", model, *flags, "-o", "s.safetensors", "--json")
        assert code == 0 and json.loads(out)["plan"]["budget"] == budget
    options = "--memory", "2 MB", "--input", "2,3,12,12", "-o", "s.safetensors"
    code, out, _ = _run(capsys, "compress", model, *options)
    assert code == 0 and "memory 2 MB asked, " in out and " MB, the peak of a run as measured" in out


def test_the_smallest_model_of_enough_quality(model, capsys):
    options = "-o", "s.safetensors", "--groups", "1", "--json"
    search = "--quality", "0.5", "--evaluate", "my_model.py:closeness"
    code, out, _ = _run(capsys, "compress", model, *search, *options)
    plan = alds.Plan.from_json(json.dumps(json.loads(out)["plan"]))
    assert code == 0 and plan.quality.measured >= 0.5 and plan.keep_ratio < 1 and len(plan.quality.steps) > 3
    code, _, err = _run(capsys, "compress", model, "--quality", "0.5", *options)
    assert code == 1 and "--quality and --evaluate go together" in err
    with pytest.raises(SystemExit):
        _run(capsys, "compress", model, *search, "--params", "0.5", *options)


def test_pins_and_least_ranks(model, capsys):
    options = "--params", "0.6", "-o", "s.safetensors", "--json"
    pins = "--pin", "0=dense", "--pin", "Linear=max_rank=3", "--pin", "Linear=max_keep=0.9", "--min-rank", "2"
    plan = json.loads(_run(capsys, "compress", model, *options, *pins)[1])["plan"]
    assert plan["layers"][0]["reason"] == "pinned: '0' dense" and plan["layers"][1]["rank"] in (2, 3)
    assert plan["pins"] == {"0": "dense", "Linear": {"max_rank": 3, "max_keep": 0.9}} and plan["min_rank"] == 2
    code, _, err = _run(capsys, "compress", model, *options, "--pin", "0=max_rank=0.5")
    assert code == 1 and "pins['0']: max_rank=0.5 is not an integer >= 1" in err
    with pytest.raises(SystemExit):
        _run(capsys, "compress", model, *options, "--pin", "dense")
    assert "'dense' is neither like 'layer4.*=dense' nor like" in capsys.readouterr().err


def test_module_by_dotted_name_and_weights(model, capsys, tmp_path):
    torch.manual_seed(5)
    weights = {"0.weight": torch.randn(24, 3, 3, 3), "0.bias": torch.zeros(24)}
    weights |= {"3.weight": torch.randn(10, 2400), "3.bias": torch.zeros(10)}
    save_file(weights, tmp_path / "w.safetensors")
    options = "--params", "1.0", "-o", "m.safetensors", "--weights", "w.safetensors"
    assert _run(capsys, "compress", "my_model:net", *options)[0] == 0
    namespace = {}
    exec(MODEL, namespace)
    assert torch.equal(alds.load(tmp_path / "m.safetensors", namespace["net"])[3].weight, weights["3.weight"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["analyze", "my_model.py"], "expected package.module:function or file.py:function"),
        (["analyze", "."], "'.': expected package.module:function or file.py:function; a checkpoint directory goes to"),
        (["analyze", "nowhere.py:net"], "'nowhere.py' does not exist"),
        (["analyze", "no_such_module:net"], "No module named 'no_such_module'"),
        (["analyze", "my_model.py:missing"], "'my_model.py' has no 'missing'; its functions are "),
        (["analyze", "my_model.py:broken"], "ValueError: this model is broken"),
        (["analyze", "my_model.py:nothing"], "returned a NoneType, not a torch.nn.Module"),
        (["analyze", "my_model.py:net", "--include", "zzz"], "include='zzz' matches no layer"),
        (["analyze", "my_model.py:net", "--schemes", "0,9"], "schemes=(0, 9)"),
        (["analyze", "my_model.py:net", "--weights", "none.safetensors"], "'none.safetensors' does not exist"),
        (["analyze", "my_model.py:net", "--weights", "my_model.py"], "is not a whole safetensors file"),
        (["analyze", "my_model.py:net", "--weights", "other.safetensors"], "does not fit the model"),
        (["compress", "my_model.py:net", "--params", "1.5", "-o", "x.safetensors"], "params=1.5 is outside (0, 1]"),
        (["compress", "my_model.py:net", "--params", "0.5", "-o", "no/x.safetensors"], "does not exist; create it"),
        (["compress", "my_model.py:net", "--params", "0.5", "-o", "x.pt"], "name it x.safetensors"),
        (["compress", "my_model.py:net", "--params", "0.5", "--p", "0", "-o", "x.safetensors"], "p=0.0 is outside"),
        (
            ["compress", "my_model.py:net", "--params", "0.5", "-o", "x.safetensors", "--plot", "p.xyz"],
            "does not end in",
        ),
        (
            ["compress", "my_model.py:net", "--params", "0.5", "-o", "x.safetensors", "--plot", "no/p.png"],
            "the directory",
        ),
        (["analyze", "my_model.py:leaves"], "SystemExit: 5"),
        (["show", "none.safetensors"], "does not exist"),
        (["show", "my_model.py"], "is not a whole safetensors file"),
        (["show", "other.safetensors"], "was not written by alds_fast.save"),
        (["show", "bad.json"], "not a plan"),
    ],
)
def test_refusals_exit_with_one_and_a_message(model, capsys, tmp_path, args, message):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "bad.json").write_text("{}")
    code, out, err = _run(capsys, *args)
    assert code == 1 and out == "" and f"alds-fast: {err.split('alds-fast: ')[-1]}" in err and message in err
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["melt"],
        ["compress", "m:f", "-o", "x"],
        ["compress", "m:f", "--params", "0.5", "--error", "0.5", "-o", "x"],
        ["compress", "m:f", "--params", "half", "-o", "x"],
        ["compress", "m:f", "--params", "0.5"],
        ["compress", "m:f", "--params", "0.5", "-o", "x", "--criterion", "best"],
        ["analyze", "m:f", "--schemes", "a"],
    ],
)
def test_wrong_usage_exits_with_two(args, capsys):
    with pytest.raises(SystemExit) as e:
        main(args)
    assert e.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.slow
def test_compress_draws_a_picture(model, capsys, tmp_path):
    assert _run(capsys, "compress", model, "--params", "0.5", "-o", "s.safetensors", "--plot", "p.png")[0] == 0
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_long_work_shows_a_progress_bar(model, capsys, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda stderr: Console(file=terminal, force_terminal=True, width=80))
    assert _run(capsys, "compress", model, "--params", "0.5", "-o", "s.safetensors")[0] == 0
    assert "spectra" in terminal.getvalue() and "100%" in terminal.getvalue()


def test_plot_refuses_a_plan_of_another_analysis(tmp_path):
    one, other = alds.analyze(small_net()), alds.analyze(torch.nn.Linear(32, 32))
    with pytest.raises(alds.AldsError, match="not made from this analysis"):
        alds.plot_plan(one, other.plan(params=0.5), tmp_path / "p.png")
    alds.plot_plan(one, one.plan(params=1.0), tmp_path / "dense.png")
    assert (tmp_path / "dense.png").stat().st_size > 1000
    with pytest.raises(alds.AldsError, match="analysis is a Plan, expected a Analysis: see the order"):
        alds.plot_plan(one.plan(params=1.0), one, tmp_path / "p.png")
    with pytest.raises(alds.AldsError, match="sweep is a str, expected a Sweep"):
        alds.plot_sweep(str(tmp_path / "p.png"), one)


def test_budgets_that_need_an_input(tmp_path, capsys):
    target, out = "support.models:small_net", str(tmp_path / "s.safetensors")
    assert main(["compress", target, "--flops", "0.6", "-o", out]) == 1
    assert "need --input" in capsys.readouterr().err
    assert main(["compress", target, "--flops", "0.6", "--params", "0.6", "--input", "2,3,12,12", "-o", out]) == 0
    assert "flops=0.6" in capsys.readouterr().out


def test_show_of_what_save_pretrained_wrote(capsys, tmp_path):
    """The plan stands in its config.json; of older ones, and of models that were changed by hand, the layers alone."""
    transformers = pytest.importorskip("transformers")
    config = {"hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 16}
    small = alds.compress(transformers.ResNetForImageClassification(transformers.ResNetConfig(**config)), params=0.5)
    small.save_pretrained(tmp_path / "small")
    capsys.readouterr()
    code, text, _ = _run(capsys, "show", str(tmp_path / "small"))
    assert code == 0 and text.startswith(str(small.alds_plan))
    path = tmp_path / "small" / "config.json"
    settings = json.loads(path.read_text())
    settings["quantization_config"]["plan"]["p"] = "four"
    path.write_text(json.dumps(settings))
    code, _, refusal = _run(capsys, "show", str(tmp_path / "small"))
    assert code == 1 and "the plan in config.json is damaged" in refusal
    del settings["quantization_config"]["plan"]
    path.write_text(json.dumps(settings))
    code, text, _ = _run(capsys, "show", str(tmp_path / "small"))
    low = {n: m for n, m in small.named_modules() if isinstance(m, (alds.LowRankConv2d, alds.LowRankLinear))}
    name, layer = next(iter(low.items()))
    row = next(line for line in text.splitlines() if line.startswith(f"{name} "))
    assert code == 0 and row.split()[2:] == [str(v) for v in layer.decomposition if v != ""]
    assert f"{len(low)} low-rank layers" in text and "alds_plan.json" in text
    code, text, _ = _run(capsys, "show", str(tmp_path / "small"), "--json")
    assert code == 0 and set(json.loads(text)["layers"]) == set(low)
    transformers.ResNetModel(transformers.ResNetConfig(**config)).save_pretrained(tmp_path / "dense")
    code, _, refusal = _run(capsys, "show", str(tmp_path / "dense"))
    assert code == 1 and "was not compressed by alds_fast" in refusal


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"alds_fast {alds.__version__}\n"


BLOCKS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()

def flat():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

def batches():
    torch.manual_seed(1)
    return [torch.randn(8, 6, 16) for _ in range(6)]
"""


def test_refine(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of_blocks.py").write_text(BLOCKS)
    usual = ("compress", "of_blocks.py:net", "--params", 0.6, "-o", "x.safetensors")
    data = ("--data", "of_blocks.py:batches")
    code, out, _ = _run(capsys, *usual, *data, "--refine", 1, "--json")
    assert code == 0 and json.loads(out)["factors"].keys() == {"refined"}
    code, out, _ = _run(capsys, *usual, *data, "--refit", "--refine", "--json")
    assert code == 0 and "refined" in json.loads(out)["factors"]
    code, _, err = _run(capsys, *usual, "--refine")
    assert code == 1 and "--refine needs --data" in err
    code, _, err = _run(capsys, "compress", "of_blocks.py:flat", *usual[2:], *data, "--refine", 2)
    assert code == 1 and "refine() needs a chain of blocks" in err
    with pytest.raises(SystemExit):
        main([*map(str, usual), *data, "--refine", "0"])
    assert "0 is not a number of passes" in capsys.readouterr().err
