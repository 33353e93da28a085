"""Checkpoint directories: what comes out is what the model in memory gives."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.checkpoints import OPTIONS
from support.marks import slow
from support.models import count
from torch import nn

import alds_fast as alds
from alds_fast import errors
from alds_fast.checkpoints.streaming import spectra_and_plan
from alds_fast.checkpoints.streaming.journal import FOLDER, Journal
from alds_fast.cli import commands
from alds_fast.layers import count_bytes


def tensors(folder):
    return {k: v for path in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(path).items()}


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)])
@pytest.mark.parametrize("kind", ["llama", slow("qwen"), "gpt2", slow("bert"), "vit"])
def test_same_as_in_memory(kind, dtype, tmp_path):
    dense = type(checkpoints.make(kind, tmp_path / "dense", dtype)).from_pretrained(tmp_path / "dense", dtype=dtype)
    before = checkpoints.contents(tmp_path / "dense")
    result = alds.compress_checkpoint(tmp_path / "dense", tmp_path / "small", **OPTIONS)
    assert checkpoints.contents(tmp_path / "dense") == before
    assert result.plan.params <= 0.7 * result.plan.params_before and result.plan.gap < 0.05
    assert set(result.factors) == {row.name for row in result.plan.layers if row.choice} != set()
    assert f"small', {len(result.factors)} low-rank layers: <Plan for " in repr(result) and len(repr(result)) < 300
    expected = result.plan.apply(dense)
    small = alds.from_pretrained(tmp_path / "small", dtype=dtype)
    assert type(small) is type(dense) and not small.training
    weights, wanted = small.state_dict(), expected.state_dict()
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[k], wanted[k]) for k in weights)
    with torch.no_grad():
        assert torch.equal(small(**checkpoints.inputs(kind)).logits, expected(**checkpoints.inputs(kind)).logits)
    index = json.loads((tmp_path / "small/model.safetensors.index.json").read_text())
    stored = tensors(tmp_path / "small")
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in stored.values())
    assert (tmp_path / "small/tokenizer.json").read_bytes() == before["tokenizer.json"]
    assert not (tmp_path / "small" / FOLDER).exists()


def test_one_file(tmp_path):
    checkpoints.make("llama", tmp_path / "dense", shards=False)
    alds.compress_checkpoint(tmp_path / "dense", tmp_path / "small", params=0.7)
    assert [p.name for p in (tmp_path / "small").glob("*.safetensors*")] == ["model.safetensors"]
    assert isinstance(alds.from_pretrained(tmp_path / "small").model.layers[0].mlp.up_proj, alds.LowRankLinear)


def test_a_number_of_parameters_and_the_bytes_that_the_plan_tells(tmp_path):
    """In the types that tensors are stored in, whatever config.json says."""
    dense = checkpoints.make("llama", tmp_path / "dense", torch.bfloat16)
    asked = count(dense) * 2 // 3
    plan = alds.compress_checkpoint(tmp_path / "dense", tmp_path / "small", params=asked, include=nn.Linear).plan
    assert plan.budget == f"params={asked}" and plan.params <= asked
    small = alds.from_pretrained(tmp_path / "small", dtype="auto")
    assert plan.costs == {"memory": tuple(count_bytes(model.to(torch.bfloat16)) for model in (dense, small))}
    assert "weights" in str(plan)


def test_options(tmp_path, llama):
    options = {"error": 0.3, "criterion": "operator", "align": 4, "groups": (1, 2), "exclude": "*.mlp.*"}
    plan = alds.compress_checkpoint(llama / "dense", tmp_path / "small", **options).plan
    chosen = [row for row in plan.layers if row.choice]
    assert chosen and all(row.rank % 4 == 0 and row.groups <= 2 and ".mlp." not in row.name for row in chosen)
    assert plan.error <= 0.3 and plan.criterion == "operator"


@pytest.mark.parametrize(
    "options",
    [
        {"memory": 0.6},
        {"memory": "300kB", "groups": (1, 2, 4)},
        {"memory": 0.7, "params": 0.6},
        {"params": 0.6, "min_rank": 9},
        {"params": 0.6, "pins": {"*.q_proj": "dense", "*.down_proj": {"max_rank": 6, "min_keep": 0.1}}},
    ],
)
def test_pins_and_memory_as_in_memory(tmp_path, llama, options):
    """No spectrum is left out that they need: the plan is that of the whole model, all of whose spectra are there."""
    plan = alds.compress_checkpoint(llama / "dense", tmp_path / "small", **options).plan
    model = checkpoints.dense("llama").from_pretrained(llama / "dense", dtype="auto")
    groups = {"groups": options.get("groups", (1, 2, 4, 8, 16))}
    whole = {name: value for name, value in options.items() if name != "groups"}
    expected = alds.analyze(model, **groups, precision="float32").plan(**whole)
    assert [row.choice for row in plan.layers] == [row.choice for row in expected.layers]
    assert (
        plan.error == pytest.approx(expected.error, rel=1e-9)
        and plan.budget == expected.budget
        and plan.costs == expected.costs
    )
    assert plan.pins == expected.pins and plan.min_rank == expected.min_rank
    assert alds.from_pretrained(tmp_path / "small", dtype="auto")(**checkpoints.inputs("llama")).logits.isfinite().all()


def test_spectra_left_out_for_parameters_do_not_serve_memory(llama, tmp_path):
    with pytest.raises(errors.BudgetError, match="the smallest reachable is params="):
        alds.compress_checkpoint(llama / "dense", tmp_path / "small", params=0.01)
    with pytest.raises(errors.ArgumentError, match=r"budget of=None then, 'memory' now"):
        alds.compress_checkpoint(llama / "dense", tmp_path / "small", memory=0.6)


def test_threads_change_nothing(tmp_path, llama):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)
    finally:
        torch.set_num_threads(threads)
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")


def test_again_does_nothing(llama):
    before = {p: p.stat().st_mtime_ns for p in (llama / "small").iterdir()}
    assert alds.compress_checkpoint(llama / "dense", llama / "small", **OPTIONS).plan.params > 0
    assert before == {p: p.stat().st_mtime_ns for p in (llama / "small").iterdir()}


def test_too_little_room_is_said_before_the_work(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(errors.FileWriteError, match=r"bytes are still to be written there, 10 bytes are free"):
        alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)


def test_two_jobs_in_one_directory(tmp_path, llama):
    Journal(tmp_path / "small", {}).output.mkdir()
    with Journal(tmp_path / "small", {}).lock(), pytest.raises(errors.ArgumentError, match="another process"):
        alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)


def test_other_arguments_are_refused(llama):
    with pytest.raises(errors.ArgumentError, match=r"another job \(budget=.*0\.7.* then, .*0\.6.* now\)"):
        alds.compress_checkpoint(llama / "dense", llama / "small", **{**OPTIONS, "params": 0.6})


def test_spectra_serve_other_budgets(llama, tmp_path, monkeypatch):
    """What a refused budget or a damaged layer leaves behind is not lost, as the messages say what to change."""
    with pytest.raises(errors.BudgetError, match="the smallest reachable is params="):
        alds.compress_checkpoint(llama / "dense", tmp_path / "small", **{**OPTIONS, "params": 0.01})
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "small" / FOLDER).glob("*.spectra32.*")}
    assert before
    spectra = spectra_and_plan.prune_spectra

    def in_doubt(*arguments, float32):
        assert not float32  # what the first pass found is not found again
        return spectra(*arguments, float32=float32)

    monkeypatch.setattr(spectra_and_plan, "prune_spectra", in_doubt)
    alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")


def test_other_files_go_along(copied, tmp_path):
    (copied / "1_Pooling").mkdir()
    (copied / "1_Pooling/config.json").write_text("{}")
    save_file({"linear.weight": torch.ones(2, 2)}, copied / "1_Pooling/model.safetensors")
    (copied / "pytorch_model.bin").write_text("another format")
    (copied / ".hidden").write_text("")
    alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)
    contents = checkpoints.contents(tmp_path / "small")
    assert {n for n in contents if "Pooling" in n} == {"1_Pooling/config.json", "1_Pooling/model.safetensors"}
    assert "pytorch_model.bin" not in contents and ".hidden" not in contents and "tokenizer.json" in contents


def test_a_checkpoint_without_a_layer(copied, tmp_path):
    for path in copied.glob("*.safetensors"):
        save_file({k: v for k, v in load_file(path).items() if "layers.1.mlp.up_proj" not in k}, path)
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("model.layers.1.mlp.up_proj.weight")
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(errors.FileFormatError, match=r"lacks 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)


def test_ties_that_are_stored_apart(tmp_path):
    """transformers takes them apart, so the budget counts both."""
    model = checkpoints.make("llama", tmp_path / "dense", shards=False)
    path = tmp_path / "dense/model.safetensors"
    save_file({**load_file(path), "lm_head.weight": torch.randn(96, 64)}, path)
    plan = alds.compress_checkpoint(tmp_path / "dense", tmp_path / "small", params=0.7).plan
    small = alds.from_pretrained(tmp_path / "small")
    total = count(model) + 96 * 64
    assert plan.params_before == total
    assert count(small) == plan.params <= 0.7 * total


def test_groups_that_divide_nothing(llama, tmp_path):
    with pytest.raises(errors.BudgetError):
        alds.compress_checkpoint(llama / "dense", tmp_path / "small", params=0.7, groups=(3,))
    result = alds.compress_checkpoint(llama / "dense", tmp_path / "all", params=0.7, groups="divisors")
    assert result.plan.gap < 0.05


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, errors.BudgetError, "give one budget"),
        ({"flops": 0.5}, errors.ArgumentError, "compress_checkpoint: budgets are params=, memory= or error="),
        ({"latency": 0.5}, errors.ArgumentError, r"load it with transformers, then compress\(model"),
        ({"params": 1.5}, errors.BudgetError, r"outside \(0, 1\]"),
        ({"params": 0.01}, errors.BudgetError, "the smallest reachable is params="),
        ({"params": 0.5, "criterion": "output"}, errors.ArgumentError, "needs data"),
        ({"params": 0.5, "groups": "all"}, errors.ArgumentError, "'divisors' or|'auto'"),
        ({"params": 0.5, "include": 3}, errors.ArgumentError, "include=3"),
        ({"params": 0.5, "max_shard_bytes": True}, errors.ArgumentError, "max_shard_bytes=True"),
        ({"params": 0.5, "schemes": (7,)}, errors.ArgumentError, "schemes="),
        ({"params": 0.5, "max_shard_bytes": 0}, errors.ArgumentError, "max_shard_bytes=0"),
        ({"params": 0.5, "include": "nothing"}, errors.LayerNotFoundError, "matches no layer"),
        ({"params": 0.5, "device": "tpu"}, errors.ArgumentError, "device='tpu'"),
        ({"memory": "20 apples"}, errors.BudgetError, "memory='20 apples' is not like '20MB'"),
        ({"params": 0.5, "min_rank": 0}, errors.ArgumentError, "min_rank=0"),
        ({"params": 0.5, "pins": {"nothing": "dense"}}, errors.LayerNotFoundError, "'nothing'"),
        ({"params": 0.5, "pins": {"*.q_proj": {"max_rank": 0}}}, errors.ArgumentError, "max_rank=0 is not an integer"),
        ({"params": 0.5, "pins": {"*": "dense"}}, errors.BudgetError, "that is with pins"),
    ],
)
def test_bad_arguments(llama, tmp_path, options, error, text):
    with pytest.raises(error, match=text):
        alds.compress_checkpoint(llama / "dense", tmp_path / "small", **options)


def test_bad_directories(llama, tmp_path):
    def compress(source, output):
        alds.compress_checkpoint(source, output, **OPTIONS)

    with pytest.raises(errors.MissingFileError, match="does not exist"):
        compress(tmp_path / "none", tmp_path / "small")
    with pytest.raises(errors.MissingFileError, match="create it first"):
        compress(llama / "dense", tmp_path / "none/small")
    for inside in (llama / "dense", llama / "dense/small"):
        with pytest.raises(errors.ArgumentError, match="is the checkpoint itself or in it"):
            compress(llama / "dense", inside)
    with pytest.raises(errors.ArgumentError, match="is not empty"):
        compress(llama / "dense", tmp_path.parent)
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.ArgumentError, match="is a file"):
        compress(llama / "dense", tmp_path / "file")


def test_command_line(llama, tmp_path, capsys):
    arguments = ["compress", str(llama / "dense"), "-o", str(tmp_path / "small"), "--params", "0.7"]
    assert commands.main([*arguments, "--max-shard-gb", "0.00006", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["budget"] == "params=0.7"
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")
    assert commands.main(["show", str(tmp_path / "small")]) == 0
    assert "parameters 98,624 -> " in capsys.readouterr().out
    pinned = [*arguments[:3], str(tmp_path / "pinned"), "--memory", "0.8", "--pin", "*.q_proj=dense", "--min-rank", "3"]
    assert commands.main([*pinned, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["budget"], plan["pins"], plan["min_rank"]) == ("memory=0.8", {"*.q_proj": "dense"}, 3)
    assert commands.main([*arguments, "--flops", "0.5"]) == 1
    assert "--flops does not go with a checkpoint directory" in capsys.readouterr().err
    assert commands.main([*arguments, "--max-shard-gb", "nan"]) == 1
    assert "--max-shard-gb nan is not a positive number" in capsys.readouterr().err
    assert commands.main(["compress", str(tmp_path / "nothing"), "-o", "x", "--params", "0.5"]) == 1
    assert "there is no such checkpoint directory" in capsys.readouterr().err
