"""Models with adapters of peft that are compressed: peft's calls work afterwards, or are refused by name."""

import copy
import pickle

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast.errors import ModelError
from alds_fast.layers import LowRankLayer, MergedLinears, MergedPart

peft = pytest.importorskip("peft")
X = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8))


def lora(**options):
    return peft.LoraConfig(**{"r": 2, "init_lora_weights": False, "target_modules": ["0", "2"], **options})


def compressed(config=None, model=None, **options):
    """A model with adapters on two layers, compressed: the layers below these are low-rank ones."""
    adapted = peft.get_peft_model(dense() if model is None else model, config or lora())
    small = alds.compress(adapted.eval(), **{"params": 0.6, **options})
    adapters = [m for m in small.modules() if hasattr(m, "base_layer")]
    assert adapters and all(isinstance(m.get_base_layer(), LowRankLayer) for m in adapters)
    return small


def low_rank(layer):
    return type(layer) is alds.LowRankLinear


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("slices", [1, 4])
def test_adapters_are_merged_into_the_factors(slices, safe):
    small = compressed(groups=(slices,))
    y, rank = small(X), small.base_model.model[0].base_layer.rank
    merged = small.merge_and_unload(safe_merge=safe)
    assert type(merged) is nn.Sequential and low_rank(merged[0]) and low_rank(merged[2])
    assert (merged[0].slices, merged[0].rank) == (slices, rank + 2)
    torch.testing.assert_close(merged(X), y)


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"use_rslora": True, "r": 3}, {"lora_dropout": 0.5}])
def test_options_of_lora_are_merged(options):
    small = compressed(lora(**options))
    y = small(X)
    torch.testing.assert_close(small.merge_and_unload()(X), y)


def test_merged_adapters_come_off():
    small = compressed()
    before, y = state(small), small(X)
    small.merge_adapter()
    torch.testing.assert_close(small(X), y)
    reloaded = pickle.loads(pickle.dumps(small))
    for model in (small, copy.deepcopy(small), reloaded):
        model.unmerge_adapter()
        assert same(state(model), before) and torch.equal(model(X), y)


def test_unloaded_and_disabled_adapters_leave_the_compressed_layers():
    small = compressed()
    with small.disable_adapter():
        y = small(X)
    small.merge_adapter()
    with small.disable_adapter():
        assert torch.equal(small(X), y)
    assert torch.equal(small.unload()(X), y)


def test_a_second_adapter_on_adapted_and_other_layers():
    small = compressed(lora(target_modules=["0"]), include=["*0.base_layer", "*2"])
    first = small(X)
    small.add_adapter("second", lora(r=3, target_modules=["0", "2"]))
    small.set_adapter("second")
    second = small(X)
    small.merge_adapter(["second"])
    torch.testing.assert_close(small(X), second)
    small.unmerge_adapter()
    small.set_adapter("default")
    assert torch.equal(small(X), first)
    small.set_adapter("second")
    torch.testing.assert_close(small.merge_and_unload()(X), second)


@pytest.mark.parametrize("combination", ["cat", "svd", "linear"])
def test_weighted_sums_of_adapters_are_merged(combination):
    small = compressed()
    small.add_adapter("second", lora())
    small.add_weighted_adapter(["default", "second"], [1.0, 0.5], "sum", combination_type=combination)
    small.set_adapter("sum")
    y = small(X)
    torch.testing.assert_close(small.merge_and_unload()(X), y)


READ_THE_WEIGHT = [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]


@pytest.mark.parametrize("options", READ_THE_WEIGHT)
def test_a_second_adapter_that_reads_the_weight_is_refused(options):
    small = compressed()
    before = state(small)
    with pytest.raises(ModelError, match="layer '0' cannot be adapted: .* needs a dense weight"):
        small.add_adapter("second", lora(**options))
    assert same(state(small), before)


def test_saved_adapters_are_whole(tmp_path):
    small, adapted = compressed(), peft.get_peft_model(dense(), lora())
    small.save_pretrained(tmp_path)
    on_dense = peft.PeftModel.from_pretrained(dense(), tmp_path)
    on_compressed = peft.PeftModel.from_pretrained(copy.deepcopy(small).unload(), tmp_path)
    assert torch.equal(on_compressed(X), small(X))
    assert [n for n, _ in on_dense.named_parameters()] == [n for n, _ in adapted.named_parameters()]
    adapters = {name: tensor for name, tensor in small.state_dict().items() if "lora_" in name}
    assert same(adapters, {name: tensor for name, tensor in on_dense.state_dict().items() if "lora_" in name})


def test_layers_are_merged_one_by_one():
    """Without a PeftModel around them, as diffusers has it."""
    model = dense()
    peft.inject_adapter_in_model(lora(), model)
    small = alds.compress(model.eval(), params=0.6)
    y = small(X)
    for layer in (small[0], small[2]):
        layer.merge()
        assert layer.merged and type(layer).__name__ == "LoraLowRankLinear"
    torch.testing.assert_close(small(X), y)
    for layer in (small[0], small[2]):
        layer.unmerge()
    assert torch.equal(small(X), y)


def test_models_that_are_loaded_or_deployed_are_merged(tmp_path):
    small = compressed()
    y = small(X)
    alds.save(small, tmp_path / "small.safetensors")
    loaded = alds.load(tmp_path / "small.safetensors", peft.get_peft_model(dense(), lora()))
    torch.testing.assert_close(loaded.eval().merge_and_unload()(X), y)
    deployed = alds.deploy(small, X)
    torch.testing.assert_close(deployed.merge_and_unload()(X), y)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_transposed_layers_of_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    config = lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    small, ids = compressed(config, model, params=0.9, include=["*c_attn*", "*c_fc*"]), torch.arange(16)[None]
    y = small(ids).logits
    torch.testing.assert_close(small.merge_and_unload()(ids).logits, y, rtol=1e-4, atol=1e-5)


def test_merged_models_of_transformers_are_saved(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=97))
    small = compressed(lora(target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM"), model, params=0.3)
    ids = torch.arange(16)[None]
    y = small(ids).logits
    merged = small.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, y, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    loaded = alds.from_pretrained(tmp_path, transformers.LlamaForCausalLM)
    assert torch.equal(loaded(ids).logits, merged(ids).logits)


REFUSED = {
    "ia3": lambda: peft.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"], init_ia3_weights=False),
    "loha": lambda: peft.LoHaConfig(target_modules=["0", "2"], init_weights=False),
    "lokr": lambda: peft.LoKrConfig(target_modules=["0", "2"], init_weights=False),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["0", "2"], total_step=9),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_merged_is_refused_before_anything_is_changed(kind):
    with pytest.warns(UserWarning, match=rf"adapters of 2 layers work, but .* '[\w.]*0': peft.tuners.{kind}.*unload"):
        small = compressed(REFUSED[kind](), include=["*base_layer"])
    before, y = state(small), small(X)
    where = rf"layer '0' cannot be merged: peft.tuners.{kind}.*merge first, then compress"
    for call in (small.merge_and_unload, small.merge_adapter):
        with pytest.raises(ModelError, match=where):
            call()
    with pytest.raises(ModelError, match="an adapter cannot be merged: .*LowRankLinear.*merge first, then compress"):
        small.base_model.model[0].merge()
    assert same(state(small), before) and torch.equal(small(X), y)
    assert low_rank(small.unload()[0])


def test_a_mixed_model_is_refused_as_a_whole():
    mixed = peft.get_peft_model(dense(), lora(target_modules=["0"]), mixed=True)
    mixed.add_adapter("other", peft.LoHaConfig(target_modules=["2"], init_weights=False))
    mixed.set_adapter(["default", "other"])
    small = alds.compress(mixed.eval(), params=0.6, include=["*base_layer"])
    before = state(small)
    with pytest.raises(ModelError, match="layer '2' cannot be merged: peft.tuners.loha"):
        small.merge_and_unload()
    assert same(state(small), before)


def test_adapters_of_convolutions_are_refused():
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32, 8))
    small = compressed(lora(target_modules=["0"]), model, include=["*base_layer"])
    with pytest.raises(ModelError, match=r"layer '0' cannot be merged: .*Conv2d.*LowRankConv2d.*merge first"):
        small.merge_and_unload()


def test_layers_that_deploy_has_merged_are_refused():
    small = compressed(lora(target_modules=["0"]), include=["*base_layer"])
    adapter = small.base_model.model[0]
    adapter.base_layer = MergedPart(MergedLinears([adapter.base_layer]), 0)
    with pytest.raises(ModelError, match="layer '0' cannot be merged: .*the model that was given to deploy"):
        small.merge_and_unload()
    with pytest.raises(ModelError, match="an adapter cannot be merged: .*the model that was given to deploy"):
        adapter.merge()


def test_merged_adapters_are_not_saved_beside_what_holds_them(tmp_path):
    small = compressed()
    small.merge_adapter()
    with pytest.raises(ModelError, match=r"its adapters \['default'\] are merged .*unmerge_adapter\(\)"):
        alds.save(small, tmp_path / "x.safetensors")
    small.unmerge_adapter()
    alds.save(small, tmp_path / "x.safetensors")


def test_dense_models_are_merged_as_before():
    adapted = peft.get_peft_model(dense(), lora()).eval()
    y = adapted(X)
    merged = adapted.merge_and_unload()
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(X), y)
