"""Compressed transformers models do what transformers models do."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from support import checkpoints
from support.marks import slow

import alds_fast as alds
from alds_fast import errors
from alds_fast.layers import Int8LowRankLinear, LowRankLayer, MergedLinears, MergedPart

KINDS = ["llama", "qwen", "gpt2", "bert", "vit"]
EACH_KIND = ["llama", slow("qwen"), "gpt2", slow("bert"), "vit"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Compressed checkpoint directories by kind."""
    root = tmp_path_factory.mktemp("checkpoints")
    for kind in KINDS:
        checkpoints.make(kind, root / f"{kind}-dense")
        alds.compress_checkpoint(root / f"{kind}-dense", root / kind, params=0.7, max_shard_bytes=100_000)
    return root


def size(model):
    return sum(p.numel() for p in model.parameters())


def low_rank(model):
    return [n for n, m in model.named_modules() if isinstance(m, LowRankLayer)]


def logits(model, kind):
    with torch.no_grad():
        return model(**checkpoints.inputs(kind)).logits


@pytest.mark.parametrize("kind", EACH_KIND)
def test_saved_and_loaded_it_stays_small(kind, small, tmp_path):
    model = alds.from_pretrained(small / kind)
    assert low_rank(model) and size(model) < 0.71 * size(checkpoints.dense(kind))
    model.save_pretrained(tmp_path / "saved")
    loaded = alds.from_pretrained(tmp_path / "saved")
    assert size(loaded) == size(model) and torch.equal(logits(loaded, kind), logits(model, kind))
    plan = alds.Plan.from_json((small / kind / "alds_plan.json").read_text())
    assert model.alds_plan == plan == loaded.alds_plan  # out of alds_plan.json, then of config.json
    auto = type(model).from_pretrained(tmp_path / "saved")  # transformers' own, now that it knows the format
    assert size(auto) == size(model) and torch.equal(logits(auto, kind), logits(model, kind))


@pytest.mark.parametrize("kind", EACH_KIND)
def test_compressed_in_memory_it_stays_small_too(kind, tmp_path):
    dense = checkpoints.dense(kind)
    model = alds.compress(dense, params=0.7)
    model.save_pretrained(tmp_path / "saved")
    reloaded = alds.from_pretrained(tmp_path / "saved")
    assert low_rank(reloaded) == low_rank(model) != []
    torch.testing.assert_close(logits(reloaded, kind), logits(model, kind))
    assert "quantization_config" not in dense.config.to_dict()
    alds.save(model, tmp_path / "one.safetensors")
    loaded = alds.load(tmp_path / "one.safetensors", dense)
    loaded.save_pretrained(tmp_path / "loaded")
    assert low_rank(alds.from_pretrained(tmp_path / "loaded")) == low_rank(model)


@pytest.mark.parametrize("kind", ["llama", slow("gpt2")])
def test_int8_factors_are_saved_and_loaded(kind, small, tmp_path):
    model = alds.quantize_factors(alds.from_pretrained(small / kind))
    int8 = [name for name, m in model.named_modules() if isinstance(m, Int8LowRankLinear)]
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype).save_pretrained(tmp_path / "saved")
        described = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
        assert described["version"] == 3 and described["layers"][int8[0]]["factors"] == "int8"
        for load in (alds.from_pretrained, type(model).from_pretrained):
            loaded = load(tmp_path / "saved", dtype="auto")
            assert [name for name, m in loaded.named_modules() if isinstance(m, Int8LowRankLinear)] == int8 != []
            assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
            if dtype == torch.float32:  # .to(dtype) also converts tables of frequencies, which are not in the file
                assert torch.equal(logits(loaded, kind), logits(model, kind))
    assert not any(isinstance(m, LowRankLayer) for m in loaded.dequantize().modules())
    described["layers"][int8[0]]["factors"] = "int4"
    config = json.loads((tmp_path / "saved/config.json").read_text()) | {"quantization_config": described}
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    with pytest.raises(errors.FileFormatError, match="factors='int4' of a LowRankLinear are not known"):
        alds.from_pretrained(tmp_path / "saved")


def test_deployed_models_are_saved_as_they_are(tmp_path):
    small = alds.compress(checkpoints.dense("llama"), params=0.6)
    before = logits(small, "llama")
    names = low_rank(small)
    parent, _, child = names[0].rpartition(".")
    setattr(small.get_submodule(parent), child, small.get_submodule(names[0]).to_dense())  # as deploy does
    small.save_pretrained(tmp_path / "mixed")
    loaded = alds.from_pretrained(tmp_path / "mixed")
    assert low_rank(loaded) == names[1:]
    torch.testing.assert_close(logits(loaded, "llama"), before)
    mlp = small.model.layers[0].mlp
    merged = MergedLinears([mlp.gate_proj, mlp.up_proj])
    mlp.gate_proj, mlp.up_proj = MergedPart(merged, 0), MergedPart(merged, 1)
    torch.testing.assert_close(logits(small, "llama"), before)
    with pytest.raises(errors.ModelError, match="merged by deploy cannot be saved"):
        small.save_pretrained(tmp_path / "merged")


@pytest.mark.slow
def test_deploy_takes_them():
    small = alds.compress(checkpoints.dense("llama"), params=0.6)
    fast, table = alds.deploy(small, checkpoints.inputs("llama"), report=True)
    torch.testing.assert_close(logits(fast, "llama"), logits(small, "llama"))
    assert any("gate_proj + " in str(row) for row in str(table).splitlines())  # gate and up read the same input


def test_part_of_another_model(tmp_path):
    class Tagger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = checkpoints.dense("bert").bert, torch.nn.Linear(64, 5)

    model = alds.compress(Tagger(), params=0.7)
    model.encoder.save_pretrained(tmp_path / "encoder")
    assert size(alds.from_pretrained(tmp_path / "encoder")) == size(model.encoder)


@pytest.mark.parametrize("kind", ["llama", "qwen", "gpt2"])
def test_generates(kind, small):
    model = alds.from_pretrained(small / kind)
    prompt = torch.tensor([[3, 4, 5]])
    tokens = model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=True)
    plain = model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=False)
    assert tokens.shape[1] > 3 and torch.equal(tokens, plain)
    beams = model.generate(prompt, max_new_tokens=4, num_beams=3, do_sample=False)
    assert beams.shape[1] > 3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ties_stay(kind, small, tmp_path):
    model = alds.from_pretrained(small / kind)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(100)
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.lm_head.weight.shape[0] == 100


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_gradient_checkpointing_and_training(kind, small):
    model = alds.from_pretrained(small / kind)
    batch = checkpoints.inputs(kind)
    labels = {"labels": batch["input_ids"] if kind != "bert" else torch.tensor([0, 1])}
    gradients = []
    for checkpointing in (False, True):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model.zero_grad()
        model(**batch, **labels).loss.backward()
        names = [f"{n}.{f}" for n in low_rank(model) for f in ("encoder", "decoder")]
        gradients.append({n: model.get_parameter(n).grad.clone() for n in names})
    assert all(g.abs().sum() > 0 for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("kind", EACH_KIND)
def test_types(kind, small):
    model = alds.from_pretrained(small / kind, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for convert in (lambda m: m.to(torch.float16), lambda m: m.half(), lambda m: m.float(), lambda m: m.double()):
        other = convert(copy.deepcopy(model))
        assert len({p.dtype for p in other.parameters()}) == 1
    assert torch.isfinite(logits(model.float(), kind)).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_device_maps(kind, small, tmp_path):
    model = alds.from_pretrained(small / kind)
    names = {"llama": ("model", "layers", "lm_head"), "gpt2": ("transformer", "h", "lm_head")}[kind]
    rest = [n for n, _ in getattr(model, names[0]).named_children() if n != names[1]]
    split = {f"{names[0]}.{n}": "cpu" for n in rest} | {names[2]: "cpu"}
    split |= {f"{names[0]}.{names[1]}.0": "cpu", f"{names[0]}.{names[1]}.1": "disk"}
    for device_map, folder in (("auto", None), ({"": "cpu"}, None), (split, tmp_path / "offload")):
        other = alds.from_pretrained(small / kind, device_map=device_map, offload_folder=folder)
        assert low_rank(other) == low_rank(model)
        torch.testing.assert_close(logits(other, kind), logits(model, kind))


def test_other_classes_read_it(small, tmp_path):
    head = alds.from_pretrained(small / "llama")
    base = alds.from_pretrained(small / "llama", transformers.AutoModel)
    assert type(base).__name__ == "LlamaModel" and low_rank(base) == [n.removeprefix("model.") for n in low_rank(head)]
    base.save_pretrained(tmp_path / "base")
    loaded = alds.from_pretrained(tmp_path / "base", transformers.AutoModelForCausalLM)
    assert low_rank(loaded) == low_rank(head) and torch.equal(logits(loaded, "llama"), logits(head, "llama"))
    assert alds.from_pretrained(small / "bert", transformers.AutoModel).encoder.layer[0].intermediate is not None


def test_trainer_and_peft_are_not_told_it_is_quantized(small):
    model = alds.from_pretrained(small / "llama")
    assert not model.is_quantized and model.hf_quantizer.is_trainable


@pytest.mark.slow
def test_compiles_and_exports(small):
    model = alds.from_pretrained(small / "bert")
    batch = checkpoints.inputs("bert")
    exported = torch.export.export(model, (), batch, strict=False)
    torch.testing.assert_close(exported.module()(**batch).logits, logits(model, "bert"))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_refusals(small, tmp_path):
    with pytest.raises(errors.ArgumentError, match="was not compressed by alds_fast"):
        alds.from_pretrained(small / "bert-dense")
    with pytest.raises(errors.MissingFileError):
        alds.from_pretrained(tmp_path / "none")
    with pytest.raises(errors.ArgumentError, match=r"quantized or compressed already \(alds_fast\)"):
        alds.compress_checkpoint(small / "bert", tmp_path / "twice", params=0.5)


def row(scheme=0, groups=1, rank=4, shape=(64, 64)):
    return {"scheme": scheme, "groups": groups, "rank": rank, "shape": shape}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"version": 99}, errors.FileFormatError, "newer than 3"),
        ({"version": "1"}, errors.FileFormatError, "version '1'"),
        ({"layers": {"bert.pooler.dense": [0, 1, 4]}}, errors.FileFormatError, "'bert.pooler.dense' is damaged"),
        ({"layers": {"bert.pooler.dense": row(rank="4")}}, errors.FileFormatError, "'bert.pooler.dense' is damaged"),
        ({"only": {"x.layer.0.output.dense": row(shape=(64, 128))}}, errors.PlanError, "whose layer .* may be meant"),
        ({"layers": {"bert.pooler.dense": row(rank=4000)}}, errors.ArgumentError, "rank=4000"),
        (
            {"layers": {"bert.embeddings.word_embeddings": row(shape=(64, 96))}},
            errors.FileFormatError,
            "lacks 'bert.emb",
        ),
        ({"layers": {"classifier": row(rank=1, shape=(2, 64))}}, errors.FileFormatError, "lacks 'classifier.decoder'"),
        ({"without": "bert.pooler.dense"}, errors.FileFormatError, "has factors of 'bert.pooler.dense', of which"),
    ],
)
def test_damaged_config(small, tmp_path, change, error, text):
    model = alds.from_pretrained(small / "bert")
    model.save_pretrained(tmp_path / "changed")
    config = config_of(tmp_path / "changed")
    settings = config["quantization_config"]
    layers = {**settings["layers"], **change.get("layers", {})}
    layers.pop(change.get("without"), None)
    layers = change.get("only", layers)
    config["quantization_config"] = {**settings, "version": change.get("version", 1), "layers": layers}
    (tmp_path / "changed/config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=text):
        alds.from_pretrained(tmp_path / "changed")


def test_layers_whose_weight_is_asked_for_its_type():
    """ViT asks its patch convolution, T5 its feed-forward layer; both are decomposed at small budgets."""
    vit = checkpoints.dense("vit")
    small = alds.compress(vit, params=0.3)
    assert isinstance(small.vit.embeddings.patch_embeddings.projection, alds.LowRankConv2d)
    assert torch.isfinite(logits(small, "vit")).all()
    config = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**config, decoder_start_token_id=0)).eval()
    small = alds.compress(t5, params=0.5)
    assert any(name.endswith("wo") for name in low_rank(small))
    ids = checkpoints.inputs("llama")["input_ids"]
    with torch.no_grad():
        assert torch.isfinite(small(input_ids=ids, decoder_input_ids=ids).logits).all()


def test_other_heads_and_sizes(small, tmp_path):
    model = alds.from_pretrained(small / "bert", transformers.AutoModelForTokenClassification)
    assert type(model).__name__ == "BertForTokenClassification" and "bert.pooler.dense" not in low_rank(model)
    masked = transformers.BertForMaskedLM(checkpoints.dense("bert").config)
    alds.compress(masked, params=0.5).save_pretrained(tmp_path / "masked")
    assert any(name.startswith("cls.") for name in low_rank(alds.from_pretrained(tmp_path / "masked")))
    other = alds.from_pretrained(tmp_path / "masked", transformers.AutoModelForSequenceClassification)
    assert low_rank(other) and not any(name.startswith("cls.") for name in low_rank(other))
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**checkpoints._ENCODER, image_size=32,
                                                                        patch_size=8, num_labels=40))  # fmt: skip
    alds.compress(vit, params=0.3).save_pretrained(tmp_path / "vit")
    assert "classifier" in low_rank(alds.from_pretrained(tmp_path / "vit"))
    for labels in (3, 60):
        other = alds.from_pretrained(tmp_path / "vit", num_labels=labels, ignore_mismatched_sizes=True)
        assert type(other.classifier) is torch.nn.Linear and low_rank(other)
        assert float(other.classifier.weight.abs().max()) < 1 and float(other.classifier.bias.abs().max()) < 1


def clip():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    parts = {"text_config": {**sizes, "vocab_size": 50}, "vision_config": {**sizes, "image_size": 32, "patch_size": 16}}
    return transformers.CLIPModel(transformers.CLIPConfig(**parts, projection_dim=16)).eval()


def test_parts_of_composite_models(tmp_path):
    model = alds.compress(clip(), params=0.5)
    model.save_pretrained(tmp_path / "clip")
    for cls, part in ((transformers.CLIPTextModel, "text_model"), (transformers.CLIPVisionModel, "vision_model")):
        mine, inner = alds.from_pretrained(tmp_path / "clip", cls), getattr(model, part)
        assert low_rank(mine) == low_rank(inner) != []
        for name, value in inner.state_dict().items():
            assert torch.equal(mine.state_dict()[name], value)
        inner.save_pretrained(tmp_path / part)
        loaded = alds.from_pretrained(tmp_path / part, cls)
        assert low_rank(loaded) == low_rank(inner) and size(loaded) == size(inner)
    whole = alds.from_pretrained(tmp_path / "clip")
    assert low_rank(whole) == low_rank(model)


def test_pickled_and_dequantized(small, tmp_path):
    model = alds.from_pretrained(small / "llama")
    unpickled = pickle.loads(pickle.dumps(model))
    assert low_rank(unpickled) == low_rank(model) and torch.equal(logits(unpickled, "llama"), logits(model, "llama"))
    assert (
        pickle.loads(pickle.dumps(model.config)).quantization_config.layers == model.config.quantization_config.layers
    )
    before = logits(model, "llama")
    model.dequantize(torch.float32)
    assert not low_rank(model)
    torch.testing.assert_close(logits(model, "llama"), before)
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), "llama"),
                       logits(model, "llama"))  # fmt: skip


def test_dequantized_after_saving(small, tmp_path):
    """Saving leaves the dtype in the config as text."""
    model = alds.from_pretrained(small / "llama")
    before = logits(model, "llama")
    model.save_pretrained(tmp_path / "saved")
    model.dequantize()
    assert not low_rank(model)
    torch.testing.assert_close(logits(model, "llama"), before)


def test_keywords_of_transformers(small):
    options = {"local_files_only": True, "trust_remote_code": False, "attn_implementation": "eager"}
    model, info = alds.from_pretrained(small / "llama", output_loading_info=True, **options)
    assert not info["unexpected_keys"] and model.config._attn_implementation == "eager"
    config = transformers.AutoConfig.from_pretrained(small / "llama-dense")
    assert low_rank(alds.from_pretrained(small / "llama", config=config)) == low_rank(model)
    assert getattr(config, "quantization_config", None) is None
    assert len(low_rank(alds.from_pretrained(small / "llama", num_hidden_layers=1))) < len(low_rank(model))


@pytest.mark.slow
def test_transformers_knows_the_format_where_it_was_imported_before(small):
    code = (
        "import transformers, alds_fast\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(small / 'llama')!r})\n"
        "print(sum(isinstance(m, alds_fast.LowRankLinear) for m in model.modules()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(run.stdout) == len(low_rank(alds.from_pretrained(small / "llama")))


def _forget_transformers(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "alds_fast.integrations.transformers_loader")


def test_without_transformers(small, monkeypatch):
    _forget_transformers(monkeypatch)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(errors.DependencyError, match=r"pip install 'alds_fast\[transformers\]'"):
        alds.from_pretrained(small / "bert")


BROKEN = {
    "a part is missing": "import no_such_module_at_all",
    "it says so in several lines": "raise RuntimeError('Failed to import\\nbecause of\\nthis')",
    "too old": "",
    "deep within": "try:\n    raise OSError('deep')\nexcept OSError as e:\n    raise RuntimeError('Failed') from e",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_transformers_is_told_in_one_line(text, small, tmp_path, monkeypatch):
    _forget_transformers(monkeypatch)
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers/__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    calls = (lambda: alds.from_pretrained(small / "bert"),
             lambda: alds.compress_checkpoint(small / "bert-dense", tmp_path / "new", params=0.5))  # fmt: skip
    for call in calls:
        with pytest.raises(errors.DependencyError, match="needs transformers 5.24 or newer, whose import fails") as e:
            call()
        assert "\n" not in str(e.value)
    if "deep" in text:
        assert "(OSError: deep)" in str(e.value) and "mend the package at fault" in str(e.value)


@pytest.mark.parametrize("name", ["some-org/some.model", "gpt2"])
def test_a_name_of_the_hub_says_how_to_get_a_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (alds.from_pretrained, lambda name: alds.compress_checkpoint(name, "new", params=0.5)):
        with pytest.raises(errors.MissingFileError, match=r"local directory: huggingface_hub.snapshot_download\('"):
            call(name)
    with pytest.raises(errors.MissingFileError, match="nowhere' does not exist$"):
        alds.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(errors.ArgumentError, match="is a NoneType: expected the name of a directory"):
        alds.from_pretrained(None)
