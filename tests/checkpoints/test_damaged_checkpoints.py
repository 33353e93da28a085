"""Checkpoint directories that are damaged, foreign or hold code: refused, with the file or layer and what to do."""

import json
import math
import shutil

import pytest
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.checkpoints import OPTIONS, first_shard, poison

import alds_fast as alds
from alds_fast import errors


def test_a_damaged_layer_can_be_left_out(copied, tmp_path):
    name, _ = poison(copied, b"\x00\x00\xc0\x7f")
    with pytest.raises(errors.WeightError, match="leave the layer out with exclude="):
        alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS)
    plan = alds.compress_checkpoint(copied, tmp_path / "small", **OPTIONS, exclude=[name]).plan
    assert next(row for row in plan.layers if row.name == name).choice is None


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


def test_nan_in_what_is_copied_is_named_before_the_work(copied, tmp_path):
    several = {path: load_file(path) for path in copied.glob("*.safetensors")}
    path, name = next((p, n) for p, tensors in several.items() for n, t in tensors.items() if t.dim() == 1)
    tensors = several[path]
    tensors[name][0] = math.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(errors.WeightError, match=rf"'{name[:-7]}': 1 of \d+ values of its weight are NaN or infinite"):
        alds.compress_checkpoint(copied, tmp_path / "out", **OPTIONS)


def test_a_single_file_counts_whatever_index_stands_beside_it(copied, tmp_path):
    """As for transformers: an earlier, sharded save leaves its index."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(copied)
    folder = tmp_path / "both"
    model.save_pretrained(folder, max_shard_size="40KB")
    model.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists() and (folder / "model.safetensors").exists()
    plan = alds.compress_checkpoint(folder, tmp_path / "out", **OPTIONS).plan
    assert plan.params < plan.params_before
