"""Experts that lie in one parameter are opened: the same outputs, and each expert decomposed by its own tokens."""

import copy
import pickle

import pytest
import torch
import transformers
from support.marks import slow
from torch import nn
from torch.nn.utils import parametrize

import alds_fast as alds
from alds_fast import errors
from alds_fast.criteria import collect_moments
from alds_fast.layers import LowRankLayer, OpenedExperts, decomposable, find_layers, routed_rows

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "moe_k": 2}
OF_KIND = {
    "DeepseekV3": {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
                   "head_dim": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    "Glm4Moe": {"first_k_dense_replace": 1},
    "Lfm2Moe": {"layer_types": ["full_attention", "full_attention"], "num_dense_layers": 1},
}  # fmt: skip
NEAR = ["Mixtral", "Qwen3Moe", "GptOss"]
FAR = ["Qwen2Moe", "Olmoe", "DeepseekV3", "GraniteMoe", "Glm4Moe", "Ernie4_5_Moe", "Lfm2Moe"]
KINDS = [*NEAR, *map(slow, FAR)]


def build(kind):
    """A tiny model of random weights, in evaluation mode."""
    torch.manual_seed(0)
    options = {**SIZES, **EXPERTS, **OF_KIND.get(kind, {}), "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**options)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def tokens(samples=3, length=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 32, (samples, length), generator=generator)


def logits(model, **inputs):
    with torch.no_grad():
        return model(**(inputs or {"input_ids": tokens()})).logits


def mixtures(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, OpenedExperts)}


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_model(kind):
    model = build(kind)
    model.set_experts_implementation("eager")
    opened = alds.open_experts(model)
    assert mixtures(opened) and not mixtures(model)
    transposed = kind == "GptOss"  # whose products take the weights the other way round
    for training in (False, True):
        outputs = [logits(m.train(training)) for m in (opened, model)]
        assert relative(*outputs) < 1e-6 if transposed else torch.equal(*outputs)
    model.set_experts_implementation("grouped_mm")
    assert relative(logits(opened.eval()), logits(model.eval())) < 1e-5


@pytest.mark.parametrize("kind", NEAR)
def test_gradients_are_those_of_the_model(kind):
    model = build(kind)
    opened = alds.open_experts(model)
    for each in (model, opened):
        each(input_ids=tokens(), labels=tokens()).loss.backward()
    (name, mixture), *_ = mixtures(opened).items()
    stacked = model.get_submodule(name)
    for expert in range(4):
        for stored, layer in (("gate_up_proj", "up"), ("down_proj", "down")):
            gradient = getattr(stacked, stored).grad[expert]
            linear = mixture.get_submodule(f"{expert}.{layer}")
            assert gradient.any() and relative(linear.weight.grad.mT if stacked.is_transposed else linear.weight.grad,
                                               gradient) < 1e-4  # fmt: skip
    router = name.rpartition(".")[0] + (".router.weight" if kind == "GptOss" else ".gate.weight")
    assert relative(opened.get_parameter(router).grad, model.get_parameter(router).grad) < 1e-4


@pytest.mark.parametrize("kind", NEAR)
def test_at_full_rank_outputs_are_equal(kind):
    model = build(kind).double()
    model.set_experts_implementation("eager")  # the only one of transformers' that takes float64
    opened = alds.open_experts(model)
    full = copy.deepcopy(opened)
    for name, module in opened.named_modules():
        if isinstance(module, nn.Linear) and ".experts." in name:
            low = alds.LowRankLinear.from_dense(module, rank=min(module.weight.shape))
            full.set_submodule(name, low)
    assert relative(logits(full), logits(model)) < 1e-12
    assert torch.equal(logits(alds.compress(opened, params=1.0)), logits(opened))


def test_the_model_is_not_changed_and_shares_no_memory():
    model = build("Mixtral")
    before, output = copy.deepcopy(model.state_dict()), logits(model)
    opened = alds.open_experts(model)
    with torch.no_grad():
        for parameter in opened.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), output)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sum(p.numel() for p in opened.parameters()) == sum(p.numel() for p in model.parameters())


def test_frozen_half_precision_and_meta_weights_stay_so():
    model = build("GptOss").bfloat16()
    model.model.layers[1].mlp.experts.requires_grad_(False)
    opened = alds.open_experts(model)
    assert {p.dtype for p in opened.parameters()} == {torch.bfloat16}
    first, second = mixtures(opened).values()
    assert all(p.requires_grad for p in first.parameters())
    assert not any(p.requires_grad for p in second.parameters())
    skeleton = alds.open_experts(build("GptOss").to("meta"))
    assert all(p.is_meta for p in skeleton.parameters())


@pytest.mark.parametrize("kind", NEAR)
def test_moments_count_the_tokens_routed_to_each_expert(kind):
    opened = alds.open_experts(build(kind))
    given = {}

    def note(name):
        def hook(module, args):
            given[name] = given.get(name, 0) + len(args[0])

        return hook

    layers = [layer for layer in decomposable(find_layers(opened)) if ".experts." in layer.name]
    data = [tokens(seed=seed) for seed in range(3)]
    handles = [layer.module.register_forward_pre_hook(note(layer.name)) for layer in layers]
    for batch in data:
        logits(opened, input_ids=batch)
    for handle in handles:
        handle.remove()
    moments = collect_moments(opened, data, layers, sensitivity=True)
    assert {name: m.rows for name, m in moments.items()} == given
    up = [rows for name, rows in given.items() if name.endswith(".up")]
    assert sum(up) == 2 * 3 * 3 * 7 * 2  # experts of a token, batches, samples, tokens, blocks
    assert all(m.gradient.any() for m in moments.values())


def test_padding_and_samples_kept_aside_do_not_count_in_experts():
    opened = alds.open_experts(build("Mixtral"))
    layers = [layer for layer in decomposable(find_layers(opened)) if "layers.0.mlp.experts." in layer.name]
    ids = tokens(8, 6)
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    padded = collect_moments(opened, [{"input_ids": ids, "attention_mask": mask}], layers, sensitivity=True)
    short = collect_moments(opened, [{"input_ids": ids[:, :4]}], layers, sensitivity=True)
    assert padded.keys() == short.keys() and len(padded) == 8
    for name, moments in padded.items():
        assert moments.rows == short[name].rows
        assert relative(moments.second, short[name].second) < 1e-5  # padding comes last: what it sees is no matter
    kept = collect_moments(opened, [{"input_ids": ids, "attention_mask": mask}], layers, held_out=1 / 4)
    used = collect_moments(opened, [{"input_ids": ids[:6, :4]}], layers)
    for name, moments in kept.items():
        assert moments.rows == used[name].rows and relative(moments.second, used[name].second) < 1e-5
        assert len(moments.held) == padded[name].rows - moments.rows


def test_rows_are_told_inside_of_an_expert_alone():
    opened = alds.open_experts(build("Mixtral"))
    seen = []
    (mixture, _) = mixtures(opened).values()
    mixture.get_submodule("0.down").register_forward_pre_hook(lambda module, args: seen.append(routed_rows()))
    logits(opened)
    assert len(seen) == 1 and seen[0].total == 21 and seen[0].rows.max() < 21
    assert routed_rows() is None
    assert seen[0].same(seen[0]) and not seen[0].same(None)


def test_an_expert_that_no_token_reaches_is_judged_by_its_weights():
    model = build("GptOss")
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[3] = -1e4
    opened = alds.open_experts(model)
    small = alds.compress(opened, params=0.5, data=[tokens(seed=seed) for seed in range(3)], sensitivity=True)
    lonely = {row.name for row in small.alds_plan.layers if "no data reached it" in (row.remark or "")}
    assert lonely == {f"model.layers.0.mlp.experts.3.{layer}" for layer in ("up", "down")}


@pytest.mark.parametrize("kind", NEAR)
def test_compressed_with_data_saved_and_loaded(kind, tmp_path):
    model = build(kind)
    opened = alds.open_experts(model)
    small = alds.compress(opened, params=0.5, data=[tokens(seed=seed) for seed in range(3)], sensitivity=True)
    assert any(isinstance(m, LowRankLayer) for m in mixtures(small)["model.layers.0.mlp.experts"].modules())
    assert sum(p.numel() for p in small.parameters()) <= 0.5 * sum(p.numel() for p in model.parameters())
    output = logits(small.eval())
    small.save_pretrained(tmp_path / "small")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "small")), output)
    assert torch.equal(logits(alds.from_pretrained(tmp_path / "small")), output)
    alds.save(small, tmp_path / "small.safetensors")
    skeleton = alds.open_experts(build(kind).to("meta"))
    skeleton.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # its buffers are in no file
    assert torch.equal(logits(alds.load(tmp_path / "small.safetensors", skeleton).eval()), output)
    with pytest.raises(errors.LayerNotFoundError, match="open_experts"):
        alds.load(tmp_path / "small.safetensors", model)


def same(*models):
    """The same outputs to the bit, with weights in memory of their own: where they lie decides by which kernel torch
    multiplies, and so the last bit (seen on an AMD EPYC)."""
    for model in models:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return torch.equal(*map(logits, models))


@pytest.mark.parametrize("kind", KINDS)
def test_opened_experts_are_saved_as_such(kind, tmp_path):
    opened = alds.open_experts(build(kind))
    opened.save_pretrained(tmp_path / "opened")
    loaded = alds.from_pretrained(tmp_path / "opened")
    assert mixtures(loaded).keys() == mixtures(opened).keys() and same(loaded, opened)
    small = alds.compress(opened, params=0.5)
    small.save_pretrained(tmp_path / "small")
    dense = alds.from_pretrained(tmp_path / "small").dequantize()
    dense.save_pretrained(tmp_path / "dense")
    again = type(opened).from_pretrained(tmp_path / "dense")
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()
    assert not mixtures(again) and not any(isinstance(m, LowRankLayer) for m in again.modules())
    assert same(again, dense) and relative(logits(dense), logits(small.eval())) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_opened_and_stacked_again_it_is_the_model(kind, tmp_path):
    model = build(kind)
    opened = alds.open_experts(model)
    name = next(iter(mixtures(opened)))
    model.get_submodule(name).down_proj.requires_grad_(False)
    opened = alds.open_experts(model)
    opened.dequantize()
    assert type(opened.get_submodule(name)) is type(model.get_submodule(name))
    stored = dict(opened.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[name], parameter) and stored[name].requires_grad == parameter.requires_grad
    assert torch.equal(logits(opened), logits(model))
    opened.save_pretrained(tmp_path)
    assert same(type(model).from_pretrained(tmp_path), model)


def test_copies_and_pickles_are_whole():
    opened = alds.open_experts(build("GptOss"))
    assert torch.equal(logits(copy.deepcopy(opened)), logits(opened))
    mixture = next(iter(mixtures(opened).values()))
    x, index, weights = torch.randn(5, 16), torch.tensor([[0, 4]] * 5), torch.rand(5, 2)
    assert torch.equal(pickle.loads(pickle.dumps(mixture))(x, index, weights), mixture(x, index, weights))


def test_refit_leaves_experts_that_get_other_tokens():
    opened, data = alds.open_experts(build("Mixtral")), [tokens(8, 16, seed) for seed in range(4)]
    small = alds.compress(opened, params=0.7, data=data, refit=True)
    methods = {name: report.method for name, report in small.alds_factors.items()}
    assert set(methods.values()) == {"weighted", "refitted"}
    assert methods["model.layers.1.mlp.experts.0.up"] == "weighted"  # the router before it sees other states


def test_without_opening_the_plan_names_the_remedy(tmp_path):
    model = build("Qwen3Moe")
    reasons = {layer.kind: layer.reason for layer in find_layers(model)}
    assert reasons["Qwen3MoeExperts"].endswith("alds_fast.open_experts(model) makes layers of them")
    model.save_pretrained(tmp_path / "dense")
    done = alds.compress_checkpoint(tmp_path / "dense", tmp_path / "small", params=0.9)
    assert any("open_experts" in (row.reason or "") for row in done.plan.layers)


def _parametrized(experts):
    parametrize.register_parametrization(experts, "down_proj", nn.Identity())


def _with_a_buffer(experts):
    experts.register_buffer("scale", torch.ones(1))


def _spread(experts):
    experts._is_expert_parallel = True


def _with_a_hook(experts):
    experts.register_forward_hook(lambda module, args, output: output)


def _with_a_forward(experts):
    experts.forward = lambda hidden_states, index, weights: hidden_states


def _of_an_own_implementation(experts):
    experts.config = copy.copy(experts.config)
    experts.config._experts_implementation_internal = "mine"


def _of_other_numbers(experts):
    experts.num_experts = 3


def _with_a_norm(experts):
    experts.has_post_expert_norm = True


def _of_integers(experts):
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.int8), False)


FAULTS = {
    _parametrized: "remove_parametrizations",
    _with_a_buffer: "buffers beside",
    _spread: "expert parallelism",
    _with_a_hook: "hooks",
    _with_a_forward: "forward of its own",
    _of_an_own_implementation: "'mine'",
    _of_other_numbers: "do not fit together",
    _with_a_norm: "norm after each expert",
    _of_integers: "down_proj",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_experts_that_are_not_as_known_stay_with_the_reason(fault):
    model = build("Mixtral")
    for layer in model.model.layers:
        fault(layer.mlp.experts)
    with pytest.raises(errors.ModelError, match=FAULTS[fault]):
        alds.open_experts(model)
    reasons = [layer.reason for layer in find_layers(model) if layer.name.endswith("mlp.experts")]
    assert len(reasons) == 2 and all(FAULTS[fault] in reason for reason in reasons)


class StrangeExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x):
        return torch.einsum("eij,...j->...i", self.weight, x)


def test_experts_of_another_making_stay_with_the_reason():
    with pytest.raises(errors.ModelError, match="in a way of its own"):
        alds.open_experts(nn.Sequential(StrangeExperts()))
    with pytest.raises(errors.ModelError, match="none in one parameter"):
        alds.open_experts(nn.Linear(2, 2))


def test_tied_experts_are_refused():
    model = build("Mixtral")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    with pytest.raises(errors.ModelError, match="tied"):
        alds.open_experts(model)


def test_a_mixture_by_itself_is_opened():
    model = build("Mixtral")
    model.set_experts_implementation("eager")
    experts = model.model.layers[0].mlp.experts
    x, index, weights = torch.randn(5, 16), torch.tensor([[0, 4]] * 5), torch.rand(5, 2)  # 4 stands for no expert
    assert torch.equal(alds.open_experts(experts)(x, index, weights), experts(x, index, weights))
