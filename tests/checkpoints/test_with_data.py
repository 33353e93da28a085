"""Checkpoint directories compressed with data: the factors of the model in memory, resumed to the same bytes."""

import functools
import itertools
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from support import checkpoints
from support.cut_off import cut_off
from support.killed import WITH_DATA, batches

import alds_fast as alds
from alds_fast import errors
from alds_fast.checkpoints.streaming import factors_and_files
from alds_fast.checkpoints.streaming.source_checksums import batches_digest, sensitivity_text
from alds_fast.checkpoints.with_data import refining
from alds_fast.cli.commands import main
from alds_fast.cli.texts import read_windows
from alds_fast.layers import LowRankLayer

WORDS = [f"w{i}" for i in range(90)]


OPTIONS = {"params": 0.7, "data": batches(), **WITH_DATA}
SMALLER = {**OPTIONS, "params": 0.3}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with_data")
    checkpoints.make("llama", folder / "dense")
    alds.compress_checkpoint(folder / "dense", folder / "small", refit=True, **OPTIONS)
    return folder


def test_same_as_in_memory(made):
    small, model = alds.from_pretrained(made / "small"), checkpoints.dense("llama")
    model.config.use_cache = False
    analysis = alds.analyze(model, groups=(1,), include="model.layers.*", data=batches(), sensitivity="kl")
    plan = analysis.plan(params=0.7, bias_correction=False)
    other = plan.apply(model, refit=batches())
    done = alds.compress_checkpoint(made / "dense", made / "small", refit=True, **OPTIONS)
    assert done.plan.criterion == "sensitivity" and [r.method for r in done.factors.values()].count("refitted") > 0
    assert [row.rank for row in done.plan.layers] == [row.rank for row in plan.layers]
    low = {n: m for n, m in other.named_modules() if isinstance(m, LowRankLayer)}
    assert low
    for name, layer in low.items():
        assert torch.allclose(small.get_submodule(name).encoder, layer.encoder, atol=1e-5), name
    x = checkpoints.inputs("llama")
    with torch.no_grad():
        assert torch.allclose(small(**x).logits, other(**x).logits, atol=1e-3)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A chain of blocks, and what an undisturbed job makes of it."""
    folder = tmp_path_factory.mktemp("deep")
    checkpoints.make("deep", folder / "dense")
    alds.compress_checkpoint(folder / "dense", folder / "small", refit=True, **OPTIONS)
    return folder


def test_a_chain_gives_what_whole_passes_give(deep):
    small, model = alds.from_pretrained(deep / "small"), checkpoints.dense("deep")
    model.config.use_cache = False
    analysis = alds.analyze(model, groups=(1,), include="model.layers.*", data=batches(), sensitivity="kl")
    plan = analysis.plan(params=0.7, bias_correction=False)
    other = plan.apply(model, refit=batches())
    assert [row.rank for row in plan.layers] == [row.rank for row in alds.Plan.from_json(
        (deep / "small" / "alds_plan.json").read_text()).layers]  # fmt: skip
    x = checkpoints.inputs("deep")
    with torch.no_grad():
        assert torch.allclose(small(**x).logits, other(**x).logits, atol=1e-3)


@pytest.fixture(scope="module")
def refined(deep):
    """The same, smaller, not refitted, and with refinement."""
    alds.compress_checkpoint(deep / "dense", deep / "drafted", **SMALLER)
    alds.compress_checkpoint(deep / "dense", deep / "refined", refine=4, **SMALLER)
    return deep


def test_refined_blocks_are_those_of_the_model_in_memory(refined):
    dense, small = checkpoints.dense("deep"), alds.from_pretrained(refined / "drafted")
    for model in (dense, small):
        model.config.use_cache = False
    want, blocks = alds.refine(small, dense, batches(), epochs=4)
    assert any(block.after < block.before for block in blocks)
    got = alds.from_pretrained(refined / "refined")
    norm = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(got.get_parameter(norm), dense.get_parameter(norm))
    for name, parameter in want.named_parameters():
        assert torch.allclose(got.get_parameter(name), parameter, atol=2e-4), name
    reports = json.loads((refined / "refined" / "alds_factors.json").read_text())
    assert {report["method"] for report in reports.values()} == {"refined"}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "kind, number", [("refined", 0), ("refined", 2), ("changed", 0), ("report", 1), ("factors", 2)]
)
def test_refinement_cut_off_while_it_works(refined, tmp_path, monkeypatch, kind, number, when):
    options = {"refine": 4, **SMALLER}
    with cut_off(monkeypatch, kind, number, when):
        alds.compress_checkpoint(refined / "dense", tmp_path / "small", **options)
    alds.compress_checkpoint(refined / "dense", tmp_path / "small", **options)
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(refined / "refined")


@pytest.mark.parametrize("way, methods", [("refine", {"refined", "weighted"}), ("refit", {"refitted"})])
def test_half_types(tmp_path, way, methods):
    """Refit goes through a network in that type, refinement trains in float32."""
    checkpoints.make("deep", tmp_path / "dense", dtype=torch.bfloat16)
    options = {"params": 0.5, "data": batches(), "include": "model.layers.*", way: True}
    done = alds.compress_checkpoint(tmp_path / "dense", tmp_path / "small", **options)
    assert {report.method for report in done.factors.values()} <= methods
    small = alds.from_pretrained(tmp_path / "small", dtype="auto")
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_of_half_types_are_refined_as_those_in_float32_in_memory(tmp_path, dtype, monkeypatch):
    """The models are mapped out of the journal, where they lie in float32 until the job is done."""
    checkpoints.make("deep", tmp_path / "dense", dtype=dtype)
    alds.compress_checkpoint(tmp_path / "dense", tmp_path / "drafted", **SMALLER)
    small = alds.from_pretrained(tmp_path / "drafted", dtype=torch.float32)
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    want = alds.refine(small, dense, batches(), epochs=2)[0].state_dict()
    seen = []

    def refine_blocks(*models, own=refining.refine_blocks, **options):
        maps = Path("/proc/self/maps").read_text()
        seen.extend({p.dtype for p in net.parameters()} for net in models[:2])
        seen.extend(name in maps for name in ("000000.wide.safetensors", "000000.wide-small.safetensors"))
        return own(*models, **options)

    monkeypatch.setattr(refining, "refine_blocks", refine_blocks)
    alds.compress_checkpoint(tmp_path / "dense", tmp_path / "refined", refine=2, **SMALLER)
    assert seen == [{torch.float32}, {torch.float32}, True, True]
    got = alds.from_pretrained(tmp_path / "refined", dtype="auto").state_dict()
    if dtype == torch.bfloat16:  # the drafted factors are in that type
        assert all(torch.equal(value, want[name].to(value.dtype)) for name, value in got.items())
    assert not list((tmp_path / "refined").rglob("*wide*"))


def test_what_it_needs_is_said_before_the_work(tmp_path, caplog, monkeypatch):
    checkpoints.make("deep", tmp_path / "dense")
    small, sizes, units = tmp_path / "small", [], {"GB": 1e9, "bytes": 1}

    def told(*args):
        sizes.append(sum(p.stat().st_size for p in small.rglob("*") if p.is_file()))

    options = {**OPTIONS, "refit": True, "progress": told}
    with monkeypatch.context() as patch, pytest.raises(errors.FileWriteError) as e:
        patch.setattr("alds_fast.checkpoints.with_data.needs.shutil.disk_usage", lambda path: SimpleNamespace(free=5e5))
        alds.compress_checkpoint(tmp_path / "dense", small, **options)
    assert "bytes are to be written there" in str(e.value) and " bytes are free" in str(e.value) and not sizes
    with caplog.at_level(logging.INFO, logger="alds_fast"):
        alds.compress_checkpoint(tmp_path / "dense", small, **options)
    (line,) = [r for r in caplog.records if "the job takes about" in r.getMessage()]
    memory, disk = (float(n.replace(",", "")) * units[unit] for n, unit in (text.split() for text in line.args[:2]))
    assert memory > 5e8 and 0.9 < disk / max(sizes) < 1.25


def test_lists_of_blocks_by_hand(deep, tmp_path):
    by_hand = {**OPTIONS, "refit": True, "blocks": "model.layers"}
    alds.compress_checkpoint(deep / "dense", tmp_path / "small", **by_hand)
    names = [n for n in checkpoints.contents(deep / "small") if n.endswith(".safetensors")]
    assert names and all((tmp_path / "small" / n).read_bytes() == (deep / "small" / n).read_bytes() for n in names)
    with pytest.raises(errors.ArgumentError, match="blocks='layers' is no list of the model; it has model.layers"):
        alds.compress_checkpoint(deep / "dense", tmp_path / "other", **{**by_hand, "blocks": "layers"})
    with pytest.raises(errors.ArgumentError, match="blocks= needs data="):
        alds.compress_checkpoint(deep / "dense", tmp_path / "other", params=0.7, blocks="model.layers")


def test_refinement_needs_blocks(made, tmp_path):
    with pytest.raises(errors.ModelError, match="refine= needs a chain of blocks: the model has 2 modules"):
        alds.compress_checkpoint(made / "dense", tmp_path / "small", refine=True, **OPTIONS)


PLACES = [*itertools.product(["inputs", "gradients"], range(0, 5, 2)), ("collected", 0), *itertools.product(
    ["draft", "refitted", "report", "factors"], (0, 5))]  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind, number", PLACES)
def test_cut_off_while_it_works(deep, tmp_path, monkeypatch, kind, number, when):
    with cut_off(monkeypatch, kind, number, when):
        alds.compress_checkpoint(deep / "dense", tmp_path / "small", refit=True, **OPTIONS)
    alds.compress_checkpoint(deep / "dense", tmp_path / "small", refit=True, **OPTIONS)
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(deep / "small")


@pytest.mark.parametrize("kind", ["inputs", "gradients"])
def test_moments_that_were_removed_are_collected_again(deep, tmp_path, monkeypatch, kind):
    """As the message about a damaged file asks for."""
    with cut_off(monkeypatch, "collected", 0, "after"):
        alds.compress_checkpoint(deep / "dense", tmp_path / "small", refit=True, **OPTIONS)
    (tmp_path / "small" / ".alds_fast" / f"000001.{kind}.safetensors").unlink()
    alds.compress_checkpoint(deep / "dense", tmp_path / "small", refit=True, **OPTIONS)
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(deep / "small")


def test_a_refined_block_with_one_bit_changed_is_noticed(refined, tmp_path, monkeypatch):
    options = {"refine": 4, **SMALLER}
    with cut_off(monkeypatch, "refined", 2, "after"):
        alds.compress_checkpoint(refined / "dense", tmp_path / "small", **options)
    file = tmp_path / "small" / ".alds_fast" / "000002.refined.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(content)
    with pytest.raises(errors.FileFormatError, match=r"000002\.refined\.safetensors' is damaged; remove it and run"):
        alds.compress_checkpoint(refined / "dense", tmp_path / "small", **options)
    file.unlink()
    alds.compress_checkpoint(refined / "dense", tmp_path / "small", **options)
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(refined / "refined")


@pytest.mark.slow
def test_killed_at_any_moment(deep, tmp_path):
    killed = Path(__file__).parents[1] / "support" / "killed.py"
    run = subprocess.run(
        [sys.executable, killed, deep / "dense", tmp_path / "small", "data"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[0]) >= 20 and run.stdout.count(":") == 4
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(deep / "small")


def test_cut_off_before_the_files_the_model_is_not_loaded_again(made, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(factors_and_files, "write_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        alds.compress_checkpoint(made / "dense", tmp_path / "small", refit=True, **OPTIONS)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", None)
    alds.compress_checkpoint(made / "dense", tmp_path / "small", refit=True, **OPTIONS)
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(made / "small")


@pytest.mark.parametrize("change", [{"data": batches(3)}, {"sensitivity": True}, {"refit": False}])
def test_other_data_are_another_job(made, change):
    options = {"refit": True, **OPTIONS, **change}
    with pytest.raises(errors.ArgumentError, match=f"another job .*{next(iter(change))}="):
        alds.compress_checkpoint(made / "dense", made / "small", **options)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"sensitivity": "kl"}, "sensitivity= needs data="),
        ({"refit": True}, "refit= needs data="),
        ({"refine": True}, "refine= needs data="),
        ({"refine": 0.5, "data": batches()}, "refine=0.5 is neither True nor False"),
        ({"refine": True, "data": batches(1)}, "refine= has 1 batches"),
        ({"criterion": "output"}, "criterion='output' needs data="),
        ({"data": []}, "data= has no batches"),
        ({"data": torch.zeros(2, 3)}, "data is a Tensor"),
        ({"data": batches(1), "sensitivity": "entropy"}, "sensitivity='entropy' is neither"),
    ],
)
def test_bad_arguments_before_anything_is_written(made, tmp_path, options, text):
    with pytest.raises(errors.ArgumentError, match=text):
        alds.compress_checkpoint(made / "dense", tmp_path / "small", params=0.7, **options)
    assert not (tmp_path / "small").exists()


def test_statistics_of_batchnorms_are_not_written(tmp_path):
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 32], "depths": [1, 1], "layer_type": "basic"}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))
    model.save_pretrained(tmp_path / "dense")
    options = {"params": 0.9, "data": [{"pixel_values": torch.randn(8, 3, 32, 32)}]}
    with pytest.raises(errors.ArgumentError, match="statistics of BatchNorms, of which ResNetForImageClassification"):
        alds.compress_checkpoint(tmp_path / "dense", tmp_path / "small", refit=True, **options)


def with_tokenizer(folder):
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*WORDS, "[UNK]"])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)


def text(seed, count=800):
    rows = torch.randint(len(WORDS), (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[i] for i in rows)


@pytest.fixture
def directory(tmp_path):
    checkpoints.make("llama", tmp_path / "dense")
    with_tokenizer(tmp_path / "dense")
    (tmp_path / "a.txt").write_text(text(0))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text(seed, 100)}) for seed in range(1, 5)))
    return tmp_path


def run(folder, *options):
    common = ["--params", "0.7", "--include", "model.layers.*", "--sequence", "16", "--tokens", "512"]
    return main(["compress", str(folder / "dense"), "-o", str(folder / "small"), *common, *map(str, options)])


def test_command_line_with_texts(directory, capsys):
    texts = "--data", directory / "a.txt", "--also", directory / "b.jsonl"
    assert run(directory, "--sensitivity", *texts, "--json") == 0
    told = capsys.readouterr()
    printed = json.loads(told.out)
    assert printed["plan"]["criterion"] == "sensitivity" and "the job takes about" in told.err
    kept_aside, other = printed["perplexity"].values()
    for dense, small in (kept_aside, other):
        assert 1 < dense < 1000 and 1 < small < 5 * dense
    assert run(directory, "--sensitivity", *texts) == 0  # it is finished: only the table is made again
    out = capsys.readouterr().out
    assert "perplexity, dense" in out and f"{kept_aside[1]:.4g}" in out and "b.jsonl" in out


def test_command_line_with_refinement(tmp_path, capsys):
    checkpoints.make("deep", tmp_path / "dense")
    with_tokenizer(tmp_path / "dense")
    (tmp_path / "a.txt").write_text(text(0))
    options = "--data", tmp_path / "a.txt", "--refine", 1, "--tokens", 9000, "--sequence", 8, "--json"
    assert run(tmp_path, *options) == 1
    assert "refine= has 1 batches" in capsys.readouterr().err
    (tmp_path / "mine.py").write_text(
        "import torch\ndef batches():\n    return [{'input_ids': torch.arange(64).view(4, 16) % 90}] * 3\n"
    )
    assert run(tmp_path, "--data", f"{tmp_path / 'mine.py'}:batches", "--refine", 1, "--json") == 0
    assert "factors" in json.loads(capsys.readouterr().out)


def test_command_line_with_tokens_and_with_a_function(directory, capsys):
    from safetensors.torch import save_file

    save_file({"input_ids": torch.randint(90, (40, 16))}, directory / "tokens.safetensors")
    assert run(directory, "--data", directory / "tokens.safetensors") == 0
    assert "tokens.safetensors, kept aside" in capsys.readouterr().out
    (directory / "mine.py").write_text(
        "import torch\ndef batches():\n    return [{'input_ids': torch.arange(64).view(4, 16) % 90}] * 3\n"
    )
    (directory / "small").rename(directory / "first")
    assert run(directory, "--data", f"{directory / 'mine.py'}:batches", "--sensitivity", "--refit") == 0
    assert "perplexity" not in capsys.readouterr().out


def test_command_line_without_data_says_so(directory, capsys):
    assert run(directory) == 0
    assert "pass --data calibration.txt --sensitivity" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, words",
    [
        (["--sensitivity"], "--sensitivity needs --data"),
        (["--also", "b.jsonl"], "--also goes with a text as --data"),
        (["--data", "nowhere.txt"], "'nowhere.txt' is no file"),
        (["--data", "a.txt", "--sequence", "1"], "--sequence 1 is not"),
        (["--data", "a.txt", "--sequence", "700"], "fewer than two windows"),
        (["--data", "a.txt", "--sequence", "2049"], "--sequence 2049 is more than the 2048 positions"),
        (["--data", "a.txt", "--tokens", "0"], "--tokens 0 is not a positive number"),
        (["--data", "broken.jsonl"], 'is not JSON with a "text" in every line'),
        (["--data", "broken.safetensors"], "not a whole safetensors file"),
        (["--data", "bytes.txt"], "not a text in UTF-8"),
    ],
)
def test_command_line_refuses(directory, capsys, monkeypatch, options, words):
    monkeypatch.chdir(directory)
    Path("broken.jsonl").write_text('{"words": 1}\n')
    Path("broken.safetensors").write_bytes(b"\0" * 40)
    Path("bytes.txt").write_bytes(b"\xff\xfe\xfa")
    assert run(directory, *options) == 1
    assert words in capsys.readouterr().err
    assert not (directory / "small").exists()


def test_a_directory_without_a_tokenizer(directory, capsys):
    for file in (directory / "dense").glob("tokenizer*"):
        file.unlink()
    assert run(directory, "--data", directory / "a.txt") == 1
    assert "has no tokenizer" in capsys.readouterr().err


def test_what_tells_batches_and_functions_from_others(made):
    ids = batches()[0]["input_ids"]
    named = [[{"input_ids": ids, name: torch.ones_like(ids)}] for name in ("attention_mask", "position_ids")]
    assert batches_digest(named[0]) != batches_digest(named[1])
    assert sensitivity_text(lambda output, batch: output.logits) != sensitivity_text(
        lambda output, batch: output.logits * 2
    )
    with pytest.raises(errors.ArgumentError, match="sensitivity= is a partial"):
        sensitivity_text(functools.partial(max, 1))


def test_a_job_that_came_to_nothing_gives_way(made, tmp_path):
    with pytest.raises(errors.ModelError):
        alds.compress_checkpoint(made / "dense", tmp_path / "small", **{**OPTIONS, "data": [{"input_ids": ["a"]}]})
    alds.compress_checkpoint(made / "dense", tmp_path / "small", refit=True, **OPTIONS)
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(made / "small")


def test_texts_with_odd_line_ends(directory):
    lines = [json.dumps({"text": f"w1 \u2028 w2 \u0085 {text(seed, 60)}"}, ensure_ascii=False) for seed in range(3)]
    (directory / "odd.JSONL").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    assert read_windows(str(directory / "odd.JSONL"), str(directory / "dense"), 16).shape[1] == 16
