"""Models of transformers that lost hidden units: saved, loaded, saved again, and made dense."""

import json

import pytest
import torch

import alds_fast as alds
from alds_fast.criteria import find_hidden_units
from alds_fast.errors import FileFormatError
from alds_fast.layers import decomposable, find_layers

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, intermediate_size=80, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 10 * torch.logspace(0, -2, 80)  # units that can go
    return model


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(1)
    return list(torch.randint(0, 100, (6, 3, 24)))


@pytest.fixture(scope="module")
def small(data):
    options = {"data": data, "sensitivity": "kl", "groups": (1,)}
    small = alds.compress(llama(), params=0.7, **options, hidden_units=True)
    assert len(small.alds_plan.hidden_units) == 2
    return small


def logits(model, x):
    with torch.no_grad():
        return model(x).logits


def test_save_pretrained_keeps_the_widths(small, data, tmp_path):
    small.save_pretrained(tmp_path / "once")
    settings = json.loads((tmp_path / "once" / "config.json").read_text())["quantization_config"]
    assert settings["version"] == 2 and settings["narrowed"]["model.layers.0.mlp.up_proj"]["dense_shape"] == [80, 32]
    loaded = alds.from_pretrained(tmp_path / "once")
    assert torch.equal(logits(loaded, data[0]), logits(small, data[0]))
    loaded.save_pretrained(tmp_path / "twice")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert torch.equal(logits(again, data[0]), logits(small, data[0]))
    assert torch.equal(again.generate(data[0][:, :4], max_new_tokens=3, do_sample=False)[:, :4], data[0][:, :4])


def test_dequantized_it_has_the_sizes_of_its_config(small, data, tmp_path):
    small.save_pretrained(tmp_path / "compressed")
    dense = alds.from_pretrained(tmp_path / "compressed").dequantize()
    assert {tuple(m.mlp.up_proj.weight.shape) for m in dense.model.layers} == {(80, 32)}
    dense.save_pretrained(tmp_path / "dense")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(loaded, data[0]), logits(small, data[0]), rtol=1e-4, atol=1e-4)


def test_damaged_widths_are_refused(small, tmp_path):
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["narrowed"]["model.layers.0.mlp.up_proj"]["shape"] = [0, 32]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileFormatError, match=r"up_proj.*shape"):
        alds.from_pretrained(tmp_path)


def models():
    sizes = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4}
    yield "Bert", transformers.BertConfig(**sizes, hidden_size=32, intermediate_size=64), 2
    yield (
        "Qwen3",
        transformers.Qwen3Config(**sizes, hidden_size=32, intermediate_size=64, num_key_value_heads=2, head_dim=8),
        2,
    )
    yield "GPTNeoX", transformers.GPTNeoXConfig(**sizes, hidden_size=32, intermediate_size=64), 2
    yield "OPT", transformers.OPTConfig(**sizes, hidden_size=32, ffn_dim=64, word_embed_proj_dim=32), 2
    yield "GPT2", transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_inner=64), 2


@pytest.mark.parametrize(("name", "config", "count"), list(models()), ids=lambda x: x if isinstance(x, str) else "")
def test_groups_of_families(name, config, count):
    model = getattr(transformers, f"{name}Model")(config).eval()
    found = find_hidden_units(model, decomposable(find_layers(model)), torch.randint(0, 60, (2, 12)), "x")
    assert [group.count for group in found] == [64] * count
