"""Checkpoint directories: what comes out is what the model in memory gives, whatever happens on the way."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints

import alds_fast as alds
from alds_fast import errors
from alds_fast.checkpoints.safetensors_reader import open_shards
from alds_fast.checkpoints.streaming import factors_and_files, spectra_and_plan
from alds_fast.checkpoints.streaming.journal import FOLDER, Journal
from alds_fast.cli import commands

OPTIONS = {"params": 0.7, "max_shard_bytes": 60_000}
KILLED = Path(__file__).parents[1] / "support" / "killed.py"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A checkpoint directory, and what it gives."""
    folder = tmp_path_factory.mktemp("llama")
    checkpoints.make("llama", folder / "dense")
    alds.compress_checkpoint(folder / "dense", folder / "small", **OPTIONS)
    return folder


@pytest.fixture
def copied(llama, tmp_path):
    """A copy of the checkpoint that may be damaged."""
    shutil.copytree(llama / "dense", tmp_path / "dense")
    return tmp_path / "dense"


def tensors(folder):
    return {k: v for path in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(path).items()}


def first_shard(folder):
    return min(Path(folder).glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen", "gpt2", "bert", "vit"])
def test_same_as_in_memory(kind, dtype, tmp_path):
    dense = type(checkpoints.make(kind, tmp_path / "dense", dtype)).from_pretrained(tmp_path / "dense", dtype=dtype)
    before = checkpoints.contents(tmp_path / "dense")
    result = alds.compress_checkpoint(tmp_path / "dense", tmp_path / "small", **OPTIONS)
    assert checkpoints.contents(tmp_path / "dense") == before
    assert result.plan.params <= 0.7 * result.plan.params_before and result.plan.gap < 0.05
    assert set(result.factors) == {row.name for row in result.plan.layers if row.choice} != set()
    expected = result.plan.apply(dense)
    small = alds.from_pretrained(tmp_path / "small", dtype=dtype)
    assert type(small) is type(dense) and not small.training
    found, wanted = small.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in found)
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


def test_options(tmp_path, llama):
    options = {"error": 0.3, "criterion": "operator", "align": 4, "groups": (1, 2), "exclude": "*.mlp.*"}
    plan = alds.compress_checkpoint(llama / "dense", tmp_path / "small", **options).plan
    chosen = [row for row in plan.layers if row.choice]
    assert chosen and all(row.rank % 4 == 0 and row.groups <= 2 and ".mlp." not in row.name for row in chosen)
    assert plan.error <= 0.3 and plan.criterion == "operator"


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


def test_killed_at_any_moment(tmp_path, llama):
    command = [sys.executable, KILLED, llama / "dense", tmp_path / "small"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[0]) >= 20 and run.stdout.count(":") == 4
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")


def torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "alds_fast", "compress"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment)


def test_three_processes(tmp_path, llama):
    run = torchrun(3, llama / "dense", "-o", tmp_path / "small", "--params", 0.7, "--max-shard-gb", 0.00006)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("wrote ") == 1
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")


def poison(folder, value):
    """Set the first entry of a layer's weight in its file; returns the layer's name and what was there."""
    name = "model.layers.1.mlp.up_proj"
    stored = open_shards(folder).tensors[f"{name}.weight"]
    with open(stored.file, "r+b") as file:
        file.seek(stored.start)
        old = file.read(4)
        file.seek(stored.start)
        file.write(value)
    return name, old


def test_a_process_that_fails_ends_all(tmp_path, copied, llama):
    name, good = poison(copied, b"\x00\x00\xc0\x7f")
    arguments = (copied, "-o", tmp_path / "small", "--params", 0.7, "--max-shard-gb", 0.00006)
    run = torchrun(2, *arguments)
    assert run.returncode != 0 and f"layer '{name}': 1 of" in run.stderr and not list(tmp_path.glob("small/*.json"))
    poison(copied, good)
    run = torchrun(2, *arguments)
    assert run.returncode == 0, run.stderr
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")


def test_nan_names_the_layer_and_loses_nothing(tmp_path, copied, llama):
    name, good = poison(copied, b"\x00\x00\xc0\x7f")
    with pytest.raises(errors.WeightError, match=f"layer '{name}': 1 of 11264 weights"):
        alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)
    poison(copied, good)
    alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")


def test_changed_between_analysis_and_factors(tmp_path, copied, monkeypatch):
    def change(work):
        poison(copied, b"\x00\x00\x80\x3f")
        return plan(work)

    plan = factors_and_files.find_plan
    monkeypatch.setattr(factors_and_files, "find_plan", change)
    with pytest.raises(errors.FileFormatError, match=r"layers\.1\.mlp\.up_proj.*changed since it was analysed"):
        alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)


def test_full_disk_loses_nothing(tmp_path, llama):
    child = os.fork()
    if child == 0:  # files of more than 30 kB cannot be written here: spectra and small factors can
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        torch.set_num_threads(1)
        try:
            alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)
        except errors.FileWriteError as e:
            os._exit(3 if "free some space and run the same command again" in str(e) else 4)
        os._exit(5)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 3
    assert list(tmp_path.glob(f"small/{FOLDER}/*.spectra32.*")) and not list(tmp_path.glob("small/**/*.partial"))
    alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")


def test_too_little_room_is_said_before_the_work(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(errors.FileWriteError, match=r"GB are still to be written there, 0.00 GB are free"):
        alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)


def test_two_jobs_in_one_directory(tmp_path, llama):
    Journal(tmp_path / "small", {}).output.mkdir()
    with Journal(tmp_path / "small", {}).locked(), pytest.raises(errors.ArgumentError, match="another process"):
        alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)


def test_other_arguments_are_refused(llama):
    with pytest.raises(errors.ArgumentError, match=r"another job \(budget=.*0\.7.* then, .*0\.6.* now\)"):
        alds.compress_checkpoint(llama / "dense", llama / "small", **{**OPTIONS, "params": 0.6})


def stopped(monkeypatch, phase, source, output, **options):
    """Start a job that is stopped before a phase of it."""
    with monkeypatch.context() as patch:
        patch.setattr(factors_and_files, phase, lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            alds.compress_checkpoint(source, output, **{**OPTIONS, **options})


def rewrite(folder, change, *names):
    """Change tensors of a checkpoint in place: all whose names hold one of ``names``."""
    for path in sorted(folder.glob("*.safetensors")):
        found = load_file(path)
        changed = {k: change(v) if any(n in k for n in names) else v for k, v in found.items()}
        save_file(changed, path, {"format": "pt"})


@pytest.mark.parametrize("phase", ["find_plan", "find_factors", "write_files", "write_rest", None])
@pytest.mark.parametrize("names", ["embed_tokens", "up_proj", "norm"])
def test_an_input_that_has_changed_is_refused(copied, tmp_path, monkeypatch, phase, names):
    if phase is None:
        alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)
    else:
        stopped(monkeypatch, phase, copied, tmp_path / "small")
    rewrite(copied, lambda t: 2 * t + 1, names)
    with pytest.raises(errors.ArgumentError, match=rf"the tensor '.*{names}.*' has changed since this job began"):
        alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)


def test_an_input_that_was_written_again_is_not_changed(copied, tmp_path, monkeypatch, llama):
    stopped(monkeypatch, "find_factors", copied, tmp_path / "small")
    rewrite(copied, lambda t: t, "up_proj")
    alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)
    for name in ("config.json", "model.safetensors.index.json", "alds_plan.json"):
        assert (tmp_path / "small" / name).read_bytes() == (llama / "small" / name).read_bytes()
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(errors.ArgumentError, match="holds another job .others="):
        alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)


def test_spectra_serve_other_budgets(llama, tmp_path, monkeypatch):
    """What a refused budget or a damaged layer leaves behind is not lost, as the messages say what to change."""
    with pytest.raises(errors.BudgetError, match="the smallest reachable is params="):
        alds.compress_checkpoint(llama / "dense", tmp_path / "small", **{**OPTIONS, "params": 0.01})
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "small" / FOLDER).glob("*.spectra32.*")}
    assert before
    spectra = spectra_and_plan.pruned_spectra

    def in_doubt(*arguments, float32):
        assert not float32  # what the first pass found is not found again
        return spectra(*arguments, float32=float32)

    monkeypatch.setattr(spectra_and_plan, "pruned_spectra", in_doubt)
    alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")


def test_a_damaged_layer_can_be_left_out(copied, tmp_path):
    name, _ = poison(copied, b"\x00\x00\xc0\x7f")
    with pytest.raises(errors.WeightError, match="leave the layer out with exclude="):
        alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)
    plan = alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS, exclude=[name]).plan
    assert next(row for row in plan.layers if row.name == name).choice is None


def flip(path):
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


@pytest.mark.parametrize(
    ("phase", "pattern", "damage"),
    [
        ("write_files", "*.factors.safetensors", flip),
        ("write_files", "*.factors.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-9])),
        ("write_files", "*.report.safetensors", lambda p: p.write_bytes(b"")),
        ("find_factors", "*.exact.*.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-9])),
        ("write_files", "*.spectra32.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-9])),
        ("find_factors", "alds_plan.json", lambda p: p.write_text("{}")),
        ("find_factors", "input.json", lambda p: p.write_text("[")),
    ],
)
def test_a_damaged_journal_is_noticed_and_what_to_do_helps(llama, tmp_path, monkeypatch, phase, pattern, damage):
    stopped(monkeypatch, phase, llama / "dense", tmp_path / "small")
    path = min((tmp_path / "small" / FOLDER).glob(pattern))
    damage(path)
    with pytest.raises(errors.FileFormatError, match=rf"{path.name}' is damaged.*remove") as e:
        alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)
    path.unlink() if "remove it" in str(e.value) else shutil.rmtree(tmp_path / "small")
    alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")


def test_files_that_are_gone(llama, tmp_path, monkeypatch):
    stopped(monkeypatch, "write_rest", llama / "dense", tmp_path / "small")
    first_shard(tmp_path / "small").write_bytes(b"zz")
    alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)  # written again
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")
    for name in (first_shard(tmp_path / "small").name, "alds_plan.json"):
        kept = (tmp_path / "small" / name).read_bytes()
        (tmp_path / "small" / name).unlink()
        with pytest.raises(errors.FileFormatError, match=f"{name}' is gone or damaged"):
            alds.compress_checkpoint(llama / "dense", tmp_path / "small", **OPTIONS)
        (tmp_path / "small" / name).write_bytes(kept)
    (tmp_path / "lost").mkdir()
    stopped(monkeypatch, "find_plan", llama / "dense", tmp_path / "lost")
    (tmp_path / "lost" / FOLDER / "alds_job.json").unlink()
    with pytest.raises(errors.ArgumentError, match="has lost its alds_job.json"):
        alds.compress_checkpoint(llama / "dense", tmp_path / "lost", **OPTIONS)


def test_other_files_go_along(copied, tmp_path):
    (copied / "1_Pooling").mkdir()
    (copied / "1_Pooling/config.json").write_text("{}")
    save_file({"linear.weight": torch.ones(2, 2)}, copied / "1_Pooling/model.safetensors")
    (copied / "pytorch_model.bin").write_text("another format")
    (copied / ".hidden").write_text("")
    alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)
    found = checkpoints.contents(tmp_path / "small")
    assert {n for n in found if "Pooling" in n} == {"1_Pooling/config.json", "1_Pooling/model.safetensors"}
    assert "pytorch_model.bin" not in found and ".hidden" not in found and "tokenizer.json" in found


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
    total = sum(p.numel() for p in model.parameters()) + 96 * 64
    assert plan.params_before == total
    assert sum(p.numel() for p in small.parameters()) == plan.params <= 0.7 * total


def test_groups_that_divide_nothing(llama, tmp_path):
    with pytest.raises(errors.BudgetError):
        alds.compress_checkpoint(llama / "dense", tmp_path / "small", params=0.7, groups=(3,))
    result = alds.compress_checkpoint(llama / "dense", tmp_path / "all", params=0.7, groups="divisors")
    assert result.plan.gap < 0.05


def damage_missing_shard(folder):
    first_shard(folder).unlink()


def damage_truncated(folder):
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:-1])


def damage_header(folder):
    path = first_shard(folder)
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def damage_index(folder):
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"model.norm.weight"', '"model.gone.weight"'))


def damage_index_text(folder):
    (folder / "model.safetensors.index.json").write_text("{")


def damage_twice(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shutil.copy(first_shard(folder), folder / "more.safetensors")
    index["weight_map"] |= dict.fromkeys(load_file(first_shard(folder)), "more.safetensors")
    index["weight_map"]["model.embed_tokens.weight"] = first_shard(folder).name
    path.write_text(json.dumps(index))


def damage_path(folder):
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"model-00001', '"../model-00001'))


def damage_config(folder):
    (folder / "config.json").unlink()


def damage_shape(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 176', '"intermediate_size": 180'))


def damage_quantized(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))


def damage_empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "error", "text"),
    [
        (damage_missing_shard, errors.MissingFileError, "the shard .* does not exist; copy it again"),
        (damage_truncated, errors.FileFormatError, "is not a whole safetensors file"),
        (damage_header, errors.FileFormatError, "is not a whole safetensors file"),
        (damage_index, errors.FileFormatError, "lacks the tensor 'model.gone.weight'"),
        (damage_index_text, errors.FileFormatError, "is not JSON"),
        (damage_twice, errors.FileFormatError, "is in '.*' and in '.*'"),
        (damage_path, errors.FileFormatError, "is not the name of a file in that directory"),
        (damage_config, errors.MissingFileError, "config.json' does not exist"),
        (damage_shape, errors.FileFormatError, r"has shape \(.*\), LlamaForCausalLM .* expects \(.*\)"),
        (damage_quantized, errors.ArgumentError, r"quantized or compressed already \(gptq\)"),
        (damage_empty, errors.MissingFileError, "holds neither model.safetensors nor"),
    ],
)
def test_damaged_checkpoints(copied, tmp_path, damage, error, text):
    damage(copied)
    before = checkpoints.contents(copied)
    with pytest.raises(error, match=text):
        alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)
    assert checkpoints.contents(copied) == before and not (tmp_path / "small").exists()


def test_no_code_of_the_checkpoint_is_run(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    config |= {"architectures": ["Evil"], "model_type": "evil"}
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass EvilConfig: pass\nclass Evil: pass\n")
    with pytest.raises(errors.ModelError, match="never run"):
        alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)
    with pytest.raises(errors.ArgumentError, match="never run"):
        alds.from_pretrained(copied, trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, errors.BudgetError, "give one budget"),
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
    assert commands.main([*arguments, "--flops", "0.5"]) == 1
    assert "--flops does not go with a checkpoint directory" in capsys.readouterr().err
    assert commands.main([*arguments, "--max-shard-gb", "nan"]) == 1
    assert "--max-shard-gb nan is not a positive number" in capsys.readouterr().err
    assert commands.main(["compress", str(tmp_path / "nothing"), "-o", "x", "--params", "0.5"]) == 1
    assert "there is no such checkpoint directory" in capsys.readouterr().err


HOSTS = """
set -e
ip netns add {a}; ip netns add {b}
trap 'ip netns del {a}; ip netns del {b}' EXIT
ip link add veth1 netns {a} type veth peer name veth2 netns {b}
ip -n {a} addr add 10.99.0.1/24 dev veth1; ip -n {b} addr add 10.99.0.2/24 dev veth2
for host in {a} {b}; do ip -n $host link set lo up; done
ip -n {a} link set veth1 up; ip -n {b} link set veth2 up
run() {{
  ip netns exec $1 env OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=$2 TP_SOCKET_IFNAME=$2 {python} -m torch.distributed.run \\
    --nnodes 2 --node-rank $3 --nproc-per-node 1 --master-addr 10.99.0.1 --master-port 29511 \\
    -m alds_fast compress {source} --params 0.7 -o {output} --max-shard-gb 0.00006
}}
run {b} veth2 1 & run {a} veth1 0
wait $!
"""


def _can_make_hosts():
    name = f"alds{os.getpid()}"
    made = shutil.which("ip") and subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return bool(made) and subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0


@pytest.mark.skipif(not _can_make_hosts(), reason="no network namespaces can be made here (needs ip and root)")
def test_two_hosts(tmp_path, llama):
    names = {"a": f"alds{os.getpid()}a", "b": f"alds{os.getpid()}b"}
    script = HOSTS.format(**names, python=sys.executable, source=llama / "dense", output=tmp_path / "small")
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(llama / "small")
