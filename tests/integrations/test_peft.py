"""Adapters of peft on compressed models: LoRA works, what needs a dense weight is refused while nothing is changed."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from support import checkpoints
from support.marks import slow
from torch import nn

import alds_fast as alds
from alds_fast.errors import ModelError
from alds_fast.integrations import grown_factors, teach_peft
from alds_fast.layers import LowRankLayer, MergedLinears, MergedPart

peft = pytest.importorskip("peft")


class Blocks(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(32, 48, bias), nn.Linear(48, 32, bias), nn.Linear(32, 8, bias)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


X = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))


def compressed(slices=1, bias=True):
    """All three layers are low-rank ones of rank 2."""
    model = Blocks(bias)
    for name in ("first", "second", "head"):
        setattr(model, name, alds.LowRankLinear.from_dense(getattr(model, name), rank=2, groups=slices))
    return model


def lora(**options):
    return peft.LoraConfig(**{"r": 2, "init_lora_weights": False, "target_modules": "all-linear", **options})


def factors(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}


def adapters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("slices", [1, 4])
def test_only_adapters_are_trained(slices):
    small = compressed(slices)
    adapted = peft.get_peft_model(small, lora(init_lora_weights=True))
    torch.testing.assert_close(adapted(X), compressed(slices)(X), rtol=0, atol=0)
    assert len(adapters(adapted)) == 6
    before, first = factors(adapted), adapters(adapted)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    target, losses = torch.randn(16, 8, generator=torch.Generator().manual_seed(2)), []
    for _ in range(60):
        loss = (adapted(X) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in factors(adapted).items())
    assert not any(torch.equal(p, first[name]) for name, p in adapters(adapted).items())


def test_saved_adapters_are_those_of_the_dense_model(tmp_path):
    adapted, dense = peft.get_peft_model(compressed(), lora()), peft.get_peft_model(Blocks(), lora())
    assert adapters(adapted).keys() == adapters(dense).keys()
    assert adapted.peft_config["default"].target_modules == dense.peft_config["default"].target_modules
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(compressed(), tmp_path)
    assert torch.equal(loaded(X), adapted(X))
    few = peft.PeftModel.from_pretrained(compressed(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(few(X), adapted(X))
    peft.PeftModel.from_pretrained(Blocks(), tmp_path)(X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("slices", [1, 4])
def test_merged_adapters_are_exact(slices, dtype):
    config = lora(r=3, lora_alpha=5, use_rslora=True)
    adapted = peft.get_peft_model(compressed(slices).to(dtype), config, autocast_adapter_dtype=False)
    y = adapted(X.to(dtype))
    merged = adapted.merge_and_unload(safe_merge=True)
    assert type(merged) is Blocks and {type(m) for m in merged.children()} == {alds.LowRankLinear}
    assert (merged.first.slices, merged.first.rank) == (slices, 5)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    rounding = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(merged(X.to(dtype)), y, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("slices", [1, 4])
def test_the_rank_grows_to_the_full_one_at_most(slices):
    adapted = peft.get_peft_model(compressed(slices).double(), lora(r=16))
    y = adapted(X.double())
    merged = adapted.merge_and_unload()
    assert merged.head.rank == 8 and merged.head.decomposition.check(merged.head.weight_shape)
    torch.testing.assert_close(merged(X.double()), y)


def test_grown_factors_stand_for_the_sum():
    layer = alds.LowRankLinear(12, 10, 2, groups=3, dtype=torch.float64)
    down, up = torch.randn(2, 12).double(), torch.randn(10, 2).double()
    for rank in (1, 2):
        wanted = layer.dense_weight() + up[:, :rank] @ down[:rank]
        encoder, decoder = grown_factors(layer, down[:rank], up[:, :rank])
        assert encoder.shape == (3 * (2 + rank), 4) and decoder.shape == (10, 3 * (2 + rank))
        grown = alds.LowRankLinear(12, 10, 2 + rank, groups=3, dtype=torch.float64)
        grown.encoder, grown.decoder = nn.Parameter(encoder), nn.Parameter(decoder)
        torch.testing.assert_close(grown.dense_weight(), wanted)


@pytest.mark.parametrize("bias", [True, False])
def test_biases_of_adapters_are_merged(bias):
    adapted = peft.get_peft_model(compressed(bias=bias), lora(lora_bias=True))
    y = adapted(X)
    torch.testing.assert_close(adapted.merge_and_unload()(X), y)


@pytest.mark.parametrize("slices", [1, 4])
def test_unmerged_factors_are_those_before(slices):
    adapted = peft.get_peft_model(compressed(slices), lora(lora_bias=True))
    before, y, plain = factors(adapted), adapted(X), compressed(slices)(X)
    adapted.merge_adapter()
    layer = adapted.base_model.model.first
    assert layer.merged and layer.base_layer.rank == 4
    torch.testing.assert_close(adapted(X), y)
    adapted.unmerge_adapter()
    assert not layer.merged and layer.base_layer.rank == 2 and torch.equal(adapted(X), y)
    assert all(torch.equal(p, before[name]) for name, p in factors(adapted).items())
    adapted.merge_adapter()
    with adapted.disable_adapter():
        assert torch.equal(adapted(X), plain)


def test_several_adapters():
    adapted = peft.get_peft_model(compressed(), lora())
    one = adapted(X)
    adapted.add_adapter("other", lora(r=4))
    adapted.set_adapter("other")
    two = adapted(X)
    assert not torch.allclose(one, two)
    adapted.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    adapted.set_adapter("sum")
    y = adapted(X)
    adapted.merge_adapter(["default", "other"])
    torch.testing.assert_close(adapted(X), y)
    adapted.unmerge_adapter()
    adapted.set_adapter("default")
    assert torch.equal(adapted(X), one)


def test_mixed_adapters():
    mixed = peft.get_peft_model(compressed(), lora(target_modules=["first"]), mixed=True)
    mixed.add_adapter("other", lora(target_modules=["first", "second"]))
    mixed.set_adapter(["default", "other"])
    y = mixed(X)
    torch.testing.assert_close(mixed.merge_and_unload()(X), y)


def test_a_merge_that_is_not_finite_changes_nothing():
    adapted = peft.get_peft_model(compressed(), lora(target_modules=["first"]))
    before = factors(adapted)
    with torch.no_grad():
        adapted.base_model.model.first.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        adapted.merge_and_unload(safe_merge=True)
    assert all(torch.equal(p, before[name]) for name, p in factors(adapted).items())


def test_adapted_models_are_copied_and_pickled():
    adapted = peft.get_peft_model(compressed(4), lora())
    assert torch.equal(copy.deepcopy(adapted)(X), adapted(X))
    assert torch.equal(pickle.loads(pickle.dumps(adapted))(X), adapted(X))


def test_merged_models_are_saved(tmp_path):
    small = alds.compress(Blocks(), params=0.5)
    merged = peft.get_peft_model(small, lora()).merge_and_unload()
    alds.save(merged, tmp_path / "merged.safetensors")
    loaded = alds.load(tmp_path / "merged.safetensors", Blocks())
    assert torch.equal(loaded(X), merged(X))


@pytest.mark.parametrize("kind", ["llama", *(slow(kind) for kind in ("gpt2", "bert", "vit"))])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_models_of_transformers(kind, tmp_path):
    pytest.importorskip("transformers")
    dense, batch = checkpoints.dense(kind), checkpoints.inputs(kind)
    small = alds.compress(dense, params=0.4)
    task = {"bert": "SEQ_CLS"}.get(kind)
    adapted = peft.get_peft_model(small, lora(task_type=task)).eval()
    reference = peft.get_peft_model(copy.deepcopy(dense), lora(task_type=task))
    assert any(isinstance(m.base_layer, LowRankLayer) for m in adapted.modules() if hasattr(m, "base_layer"))
    assert adapted.peft_config["default"].target_modules == reference.peft_config["default"].target_modules
    with torch.no_grad():
        y = adapted(**batch).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, y, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        loaded = alds.from_pretrained(tmp_path / "merged", type(dense))
        torch.testing.assert_close(loaded(**batch).logits, merged(**batch).logits)


def test_targets_that_peft_knows_by_itself():
    """Llama's are q_proj and v_proj where none are named; a second adapter meets the first one's layers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=97)
    small = alds.compress(transformers.LlamaForCausalLM(config), params=0.5, include="*")
    adapted = peft.get_peft_model(small, lora(target_modules=None))
    names = {n.split(".")[-1] for n, m in adapted.named_modules() if hasattr(m, "base_layer")}
    assert names == {"q_proj", "v_proj"} and not isinstance(small.lm_head, nn.Linear)
    adapted.add_adapter("all", lora())
    names = adapted.peft_config["all"].target_modules
    assert not any("lm_head" in n or "lora_" in n or "base_layer" in n for n in names)
    assert {n.split(".")[-1] for n in names} >= {"q_proj", "o_proj", "gate_proj", "down_proj"}
    small = alds.compress(transformers.LlamaForCausalLM(config), params=0.5)
    peft.inject_adapter_in_model(lora(target_modules=["q_proj"]), small)
    assert isinstance(small.model.layers[0].self_attn.q_proj.base_layer, LowRankLayer)


def convolution():
    return nn.Sequential(alds.LowRankConv2d(4, 6, 3, 2))


def deployed():
    merged = MergedLinears([alds.LowRankLinear(8, 8, 2), alds.LowRankLinear(8, 4, 2)])
    return nn.ModuleDict({"a": MergedPart(merged, 0), "b": MergedPart(merged, 1), "c": nn.Linear(8, 8)})


def ia3():
    return peft.IA3Config(target_modules=["first", "second"], feedforward_modules=["second"])


REFUSED = [
    (compressed, ia3, r"layer 'first' cannot be adapted: IA3 does not know.*to_plain"),
    (compressed, lambda: peft.AdaLoraConfig(target_modules="all-linear", total_step=9), "ADALORA does not know"),
    (compressed, lambda: peft.VeraConfig(target_modules="all-linear"), "VERA does not know.*to_plain"),
    (compressed, lambda: peft.VeraConfig(target_modules=["head"]), "layer 'head' .*VERA does not know.*to_plain"),
    (compressed, lambda: peft.LoHaConfig(target_modules=["second"]), "layer 'second' .*LOHA does not know"),
    (compressed, lambda: peft.OFTConfig(target_modules="all-linear"), "OFT does not know.*to_plain"),
    (compressed, lambda: lora(use_dora=True), "use_dora needs a dense weight; leave it out, or adapt .*to_plain"),
    (compressed, lambda: lora(init_lora_weights="pissa"), "init_lora_weights='pissa' needs a dense weight"),
    (compressed, lambda: lora(init_lora_weights="olora"), "init_lora_weights='olora' needs a dense weight"),
    (convolution, lambda: lora(target_modules=["0"]), "LoRA does not know LowRankConv2d.*to_plain"),
    (deployed, lambda: lora(target_modules=["b"]), "layer 'b' .*merged by deploy; adapt the model that was given"),
    (deployed, lora, "layer 'a' .*merged by deploy; adapt the model that was given to deploy"),
]


@pytest.mark.parametrize(("build", "config", "message"), REFUSED)
def test_what_cannot_be_adapted_is_refused_before_anything_is_changed(build, config, message):
    model = build()
    before = [(name, type(m)) for name, m in model.named_modules()]
    with pytest.raises(ModelError, match=message):
        peft.get_peft_model(model, config())
    assert [(name, type(m)) for name, m in model.named_modules()] == before


@pytest.mark.parametrize(
    "config",
    [
        lambda: lora(use_dora=True),
        lambda: lora(init_lora_weights="pissa"),
        lambda: peft.IA3Config(target_modules=["encoder", "decoder"], feedforward_modules=[]),
        lambda: peft.VeraConfig(target_modules="all-linear", init_weights=False),
        lambda: peft.LoHaConfig(target_modules=["decoder"], init_weights=False),
    ],
)
def test_the_plain_form_takes_what_is_refused(config):
    plain = alds.to_plain(compressed())
    adapted = peft.get_peft_model(plain, config()).eval()
    y = adapted(X)
    torch.testing.assert_close(adapted.merge_and_unload()(X), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", True])
def test_initialisations_that_need_no_weight(init):
    adapted = peft.get_peft_model(compressed(), lora(init_lora_weights=init))
    torch.testing.assert_close(adapted(X), compressed()(X))


def test_layers_that_are_no_target_disturb_nothing():
    model = compressed()
    model.head = nn.Linear(32, 8)
    for config in (peft.IA3Config(target_modules=["head"], feedforward_modules=[]), lora(target_modules=["head"])):
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        assert type(adapted.base_model.model.first) is alds.LowRankLinear and adapted(X).shape == (16, 8)


def test_a_peft_that_is_built_otherwise_is_left_alone(monkeypatch):
    utils = sys.modules["peft.tuners.tuners_utils"]
    before = utils.BaseTuner.inject_adapter
    monkeypatch.delattr(utils, "SEQ_CLS_HEAD_NAMES")
    with pytest.warns(UserWarning, match=r"no \['SEQ_CLS_HEAD_NAMES'\]: it cannot adapt low-rank layers; .*to_plain"):
        teach_peft()
    assert utils.BaseTuner.inject_adapter is before


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["import alds_fast, peft", "import peft, alds_fast"])
def test_any_order_of_imports(imports):
    code = f"""
import torch
{imports}
from torch import nn
import alds_fast as alds
model = nn.Sequential(alds.LowRankLinear(8, 8, 2), nn.Linear(8, 8))
adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
print(type(adapted.base_model.model[0]).__name__)
try:
    peft.get_peft_model(nn.Sequential(alds.LowRankLinear(8, 8, 2), nn.Linear(8, 8)),
                        peft.VeraConfig(target_modules="all-linear"))
except alds.AldsError as e:
    print(type(e).__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.split() == ["LoraLowRankLinear", "ModelError"], run.stderr


def test_int8_factors_are_adapted_but_not_merged():
    small = alds.quantize_factors(compressed())
    adapted = peft.get_peft_model(copy.deepcopy(small), lora(init_lora_weights=True))
    torch.testing.assert_close(adapted(X), small(X), rtol=0, atol=0)
    adapted(X).square().sum().backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_B" in n)
    before = adapted(X)
    with pytest.raises(ModelError, match="has int8 factors; take the adapters off"):
        adapted.merge_adapter()
    assert torch.equal(adapted(X), before) and torch.equal(adapted.unload()(X), small(X))
