"""Checkpoint directories whose layers lose hidden units: as in memory, and resumed to the same bytes."""

import json

import pytest
import torch
import transformers
from support import checkpoints
from support.cut_off import cut_off
from support.killed import batches

import alds_fast as alds
from alds_fast.errors import ArgumentError
from alds_fast.layers import narrowed_sizes

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}


def build(kind):
    """A model with hidden units that can go, in MLPs with biases ("opt", "gpt2") or without."""
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(**SIZES, intermediate_size=80, num_key_value_heads=2)
        model = transformers.LlamaForCausalLM(config).eval()
        consumers = [layer.mlp.down_proj for layer in model.model.layers]
    elif kind == "gpt2":  # whose weights are stored as (inputs, outputs)
        config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_inner=80, n_positions=64)
        model = transformers.GPT2LMHeadModel(config).eval()
        consumers = [block.mlp.c_proj for block in model.transformer.h]
    else:
        config = transformers.OPTConfig(**SIZES, ffn_dim=80, word_embed_proj_dim=32, max_position_embeddings=64)
        model = transformers.OPTForCausalLM(config).eval()
        consumers = [layer.fc2 for layer in model.model.decoder.layers]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.dim() == 1 else 0.0)
        for layer in consumers:
            sizes = 10 * torch.logspace(0, -2, 80)
            layer.weight *= sizes.unsqueeze(-1) if kind == "gpt2" else sizes
    return model


OPTIONS = {
    "params": 0.6, "data": batches(6), "sensitivity": "kl", "hidden_units": True, "include": "*.[0-9].*",
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "opt", "gpt2"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param).save_pretrained(folder / "dense", max_shard_size="30KB")
    done = alds.compress_checkpoint(folder / "dense", folder / "small", max_shard_bytes=30_000, **OPTIONS)
    assert len(done.plan.hidden_units) == 3
    return request.param, folder


def logits(model):
    model.config.use_cache = False
    with torch.no_grad():
        return model(**batches(1)[0]).logits


def in_memory(kind, **options):
    model = build(kind)
    model.config.use_cache = False
    data = OPTIONS["data"]
    analysis = alds.analyze(model, data=data, sensitivity="kl", groups=(1,), include=OPTIONS["include"])
    plan = analysis.plan(params=0.6, bias_correction=False, hidden_units=True)
    return plan, plan.apply(model, **options)


def test_as_in_memory(made):
    kind, folder = made
    plan, other = in_memory(kind)
    small = alds.from_pretrained(folder / "small")
    assert [units.kept for units in small_plan(folder).hidden_units] == [units.kept for units in plan.hidden_units]
    assert narrowed_sizes(small) == narrowed_sizes(other)
    torch.testing.assert_close(logits(small), logits(other), rtol=1e-3, atol=1e-4)
    reports = json.loads((folder / "small" / "alds_factors.json").read_text())
    assert {report["method"] for report in reports.values()} <= {"narrowed", "weighted"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "small")
    assert torch.equal(logits(loaded), logits(small))


def small_plan(folder):
    return alds.Plan.from_json((folder / "small" / "alds_plan.json").read_text())


def test_refitted_as_in_memory(made):
    kind, folder = made
    _, other = in_memory(kind, refit=OPTIONS["data"])
    alds.compress_checkpoint(folder / "dense", folder / "refitted", refit=True, **OPTIONS)
    small = alds.from_pretrained(folder / "refitted")
    apart = (logits(small) - logits(other)).norm() / logits(other).norm()
    assert float(apart) < 1e-3
    assert float((logits(small) - logits(alds.from_pretrained(folder / "small"))).norm()) > 1e-3


def test_refined(made):
    kind, folder = made
    done = alds.compress_checkpoint(folder / "dense", folder / "refined", refit=True, refine=20, **OPTIONS)
    assert "refined" in {report.method for report in done.factors.values()}
    dense = logits(build(kind))
    lost = [float((logits(alds.from_pretrained(folder / name)) - dense).norm()) for name in ("small", "refined")]
    assert lost[1] < lost[0]


CUTS = [("llama", "narrow", 3), ("llama", "draft", 1), ("llama", "refitted", 2), ("opt", "narrow", 0),
        ("opt", "refined", 1), ("opt", "factors", 4), ("opt", "changed", 0)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("made", "kind", "number"), CUTS, indirect=["made"])
def test_cut_off_it_goes_on_to_the_same_bytes(made, kind, number, when, monkeypatch, tmp_path):
    _, folder = made
    options = {**OPTIONS, "refit": True, "refine": 2}
    if not (folder / "whole").exists():
        alds.compress_checkpoint(folder / "dense", folder / "whole", **options)
    with cut_off(monkeypatch, kind, number, when):
        alds.compress_checkpoint(folder / "dense", tmp_path / "small", **options)
    alds.compress_checkpoint(folder / "dense", tmp_path / "small", **options)
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(folder / "whole")


@pytest.mark.parametrize("made", ["opt"], indirect=True)
def test_a_narrower_layer_that_was_removed_is_made_again(made, monkeypatch, tmp_path):
    _, folder = made
    options = {**OPTIONS, "max_shard_bytes": 30_000}
    with cut_off(monkeypatch, "narrow", 1, "after"):
        alds.compress_checkpoint(folder / "dense", tmp_path / "small", **options)
    first, *_ = sorted((tmp_path / "small" / ".alds_fast").glob("*.narrow.safetensors"))
    first.unlink()
    alds.compress_checkpoint(folder / "dense", tmp_path / "small", **options)
    assert checkpoints.contents(tmp_path / "small") == checkpoints.contents(folder / "small")


def test_needs_gradients(made):
    _, folder = made
    for options in ({}, {"data": batches(2)}):
        with pytest.raises(ArgumentError, match="needs gradients"):
            alds.compress_checkpoint(folder / "dense", folder / "none", params=0.6, hidden_units=True, **options)
    assert not (folder / "none").exists()
