"""What transformers' own from_pretrained makes of compressed directories, in fresh processes."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints

import alds_fast as alds
from alds_fast import errors
from alds_fast.integrations import quantization_config
from alds_fast.layers import LowRankLayer

CLASSES = ("AutoModel", "AutoModelForCausalLM", "LlamaForCausalLM")
LOAD = """
import torch
for kind in KINDS:
    for name in CLASSES:
        for folder in FOLDERS:
            config = transformers.LlamaConfig(**SIZES) if kind == "config" else None
            try:
                model = getattr(transformers, name).from_pretrained(folder, **({"config": config} if config else {}))
            except RuntimeError as e:
                print(f"refused: {e}")
                continue
            with torch.no_grad():
                print(float(model(torch.arange(8)[None])[0].double().sum()))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A directory written by compress_checkpoint, and one by save_pretrained of a model compressed in memory."""
    root = tmp_path_factory.mktemp("orders")
    checkpoints.make("llama", root / "dense")
    alds.compress_checkpoint(root / "dense", root / "streamed", params=0.7, max_shard_bytes=100_000)
    alds.compress(checkpoints.dense("llama"), params=0.7).save_pretrained(root / "saved")
    return [root / "streamed", root / "saved"]


def run(imports, folders, kinds=("plain",), classes=CLASSES):
    """What a fresh process prints for every class and folder, and what it writes to stderr."""
    settings = json.loads((folders[0] / "config.json").read_text())
    sizes = {name: settings[name] for name in checkpoints._DECODER} | {"tie_word_embeddings": True}
    head = f"KINDS, CLASSES, FOLDERS, SIZES = {kinds!r}, {classes!r}, {[str(f) for f in folders]!r}, {sizes!r}\n"
    done = subprocess.run([sys.executable, "-c", f"{imports}\n{head}{LOAD}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["import alds_fast, transformers", "import transformers, alds_fast"])
def test_it_loads_low_rank_layers_in_whatever_order_they_are_imported(imports, folders):
    lines, warnings = run(imports, folders)
    models = [alds.from_pretrained(folder, cls) for cls in map(_class, CLASSES) for folder in folders]
    assert all(any(isinstance(m, LowRankLayer) for m in model.modules()) for model in models)
    with torch.no_grad():
        sums = [float(model(torch.arange(8)[None])[0].double().sum()) for model in models]
    assert [float(line) for line in lines] == sums
    assert "LOAD REPORT" not in warnings and "Unknown quantization" not in warnings


def _class(name):
    import transformers

    return getattr(transformers, name)


@pytest.mark.slow
def test_a_process_without_alds_fast_refuses(folders):
    """Also where the config, which names the method, is not the directory's."""
    lines, _ = run("import transformers", folders, kinds=("plain", "config"))
    assert len(lines) == 2 * len(CLASSES) * len(folders) and all("ignore_mismatched_sizes" in line for line in lines)


def test_directories_without_marks_load(folders, tmp_path):
    """As they were written before 0.1.0: no value under the dense weight's name, no conv_groups in config.json."""
    shutil.copytree(folders[1], tmp_path / "old")
    tensors = load_file(tmp_path / "old/model.safetensors")
    marks = [name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.shape == (1, 1)]
    save_file(
        {n: t for n, t in tensors.items() if n not in marks}, tmp_path / "old/model.safetensors", {"format": "pt"}
    )
    config = json.loads((tmp_path / "old/config.json").read_text())
    assert len(marks) == len(config["quantization_config"]["layers"]) > 0
    for fields in config["quantization_config"]["layers"].values():
        del fields["conv_groups"]
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    model, same = alds.from_pretrained(folders[1]), alds.from_pretrained(tmp_path / "old")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def test_a_part_whose_config_does_not_say_it_is_refused(folders, tmp_path):
    """A layer that is left out of it by hand; transformers too drops what it says where it takes a part of a config."""
    shutil.copytree(folders[1], tmp_path / "changed")
    config = json.loads((tmp_path / "changed/config.json").read_text())
    layers = config["quantization_config"]["layers"]
    lost = next(iter(layers))
    config["quantization_config"] = quantization_config({n: f for n, f in layers.items() if n != lost})
    (tmp_path / "changed/config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        _class("AutoModelForCausalLM").from_pretrained(tmp_path / "changed")
    with pytest.raises(errors.FileFormatError, match=f"factors of {lost!r}"):
        alds.from_pretrained(tmp_path / "changed")


def test_other_sizes_are_refused_with_the_layer_and_the_remedy(folders):
    text = r"embed_tokens.weight' is of shape \(96, 64\), .* \(50, 64\); .* pass ignore_mismatched_sizes=True"
    with pytest.raises(errors.PlanError, match=text):
        alds.from_pretrained(folders[0], vocab_size=50, tie_word_embeddings=True)


def test_marks_are_passed_over_by_the_layers_they_stand_for_and_by_no_other(tmp_path):
    dense = checkpoints.dense("qwen")
    small = alds.compress(dense, params=0.7)
    small.save_pretrained(tmp_path / "small")
    state = load_file(tmp_path / "small/model.safetensors")
    other = alds.from_pretrained(tmp_path / "small")
    name = next(name for name, layer in other.named_modules() if isinstance(layer, LowRankLayer))
    torch.nn.init.zeros_(other.get_submodule(name).encoder)
    other.load_state_dict(state, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), small.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="size mismatch"):
        dense.load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match="Unexpected"):
        other.load_state_dict({**state, f"{name}.weight": dense.get_parameter(f"{name}.weight")}, strict=True)
