"""The peers and ours on a tiny random Llama: statistics, walks, ranks, resuming, the table."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import alds_fast as alds
from benchmarks.quality.language import perplexity
from benchmarks.quality.peers import __main__ as run
from benchmarks.quality.peers import formulas, layers, methods, ours, peers, search, sequential, statistics, table
from benchmarks.quality.peers.setting import Setting, spread

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def setting():
    """float64, so that what is compared is exact."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=61, use_cache=False)
    model = transformers.LlamaForCausalLM(config).double().eval()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    calibration = list(torch.randint(61, (8, 20)).split(1))
    return Setting(model, "model.layers.*", calibration, {"one": torch.randint(61, (3, 20))})


@pytest.fixture(scope="module")
def inputs(setting):
    return statistics.input_moments(setting.model, setting.calibration, list(setting.layers))


def layer_inputs(model, name, batches):
    seen = []
    with layers.before_calls(model, [name], lambda _, x: seen.append(x.flatten(0, -2))), torch.no_grad():
        for batch in batches:
            model(batch)
    return torch.cat(seen)


def test_layers_that_read_one_tensor_are_together(setting):
    groups = layers.input_groups(setting.model, list(setting.layers), setting.calibration[0])
    short = [[name.rpartition(".")[2] for name in group] for group in groups[:4]]
    assert short == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert sorted(name for group in groups for name in group) == sorted(setting.layers) and len(groups) == 12


@pytest.mark.parametrize("part", ["self_attn.v_proj", "mlp.down_proj"])
def test_moments_are_those_of_all_tokens(setting, inputs, part):
    name = f"model.layers.1.{part}"
    x = layer_inputs(setting.model, name, setting.calibration)
    torch.testing.assert_close(inputs.second[name], x.T @ x / len(x))
    torch.testing.assert_close(inputs.size[name], x.abs().mean(0))


def test_fisher_rows_are_sums_of_squared_gradients(setting):
    name = "model.layers.2.mlp.up_proj"
    found = statistics.fisher_rows(setting.model, setting.calibration[:2], list(setting.layers))[name]
    weight, expected = setting.layers[name].weight, 0
    for batch in setting.calibration[:2]:
        logits = setting.model(batch).logits[0, :-1]
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, batch[0, 1:]), weight)
        expected = expected + gradient.square().sum(1) / 2
    torch.testing.assert_close(found, expected)
    assert all(p.requires_grad for p in setting.model.parameters())


@pytest.mark.parametrize("share", [0.8, 0.4])
def test_uniform_methods_keep_their_share(setting, inputs, share):
    small = peers.svd_llm(setting, share, inputs)
    left = layers.share_left(small, setting.model, setting.include)
    assert share - 0.15 < left <= share
    low = [m for m in small.modules() if isinstance(m, alds.LowRankLinear)]
    assert len(low) == len(setting.layers) and all(not m.pivots and m.slices == 1 for m in low)
    again = setting.share_of_all(share) * sum(p.numel() for p in setting.model.parameters())
    assert sum(p.numel() for p in small.parameters()) <= again + 1e-6


def test_swift_svd_and_whitened_svd_are_one_model(setting, inputs):
    made = [peer(setting, 0.6, inputs)(setting.texts["one"]).logits for peer in (peers.svd_llm, peers.swift_svd)]
    torch.testing.assert_close(*made, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["updated", "anchored"])
def test_layers_in_order_see_what_the_compressed_ones_before_return(setting, inputs, kind):
    """Every layer, given its inputs in the finished network, is that of the formula.

    Compared by outputs: a low-rank v_proj leaves o_proj inputs of less than full rank, so that its weight is not one.
    """
    small = (peers.svd_llm_updated if kind == "updated" else peers.aa_svd)(setting, 0.6, inputs)
    before = {name: p.clone() for name, p in setting.model.named_parameters()}
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.down_proj"):
        weight, layer = setting.layers[name].weight.detach(), small.get_submodule(name)
        x, seen = (layer_inputs(net, name, setting.calibration) for net in (setting.model, small))
        moments = x.T @ seen / len(x), seen.T @ seen / len(x)
        if kind == "updated":
            right = formulas.whitened(weight, inputs.second[name], layer.rank)[1]
            left, right = formulas.updated(weight, *moments, right)
        else:
            left, right = formulas.anchored(weight, *moments, layer.rank)
        torch.testing.assert_close(seen @ layer.dense_weight().T, seen @ (left @ right).T, rtol=1e-6, atol=1e-8)
    assert all(torch.equal(p, before[name]) for name, p in setting.model.named_parameters())


def test_what_is_no_chain_is_refused(monkeypatch, setting, inputs):
    monkeypatch.setattr(sequential, "find_chain", lambda *args: SimpleNamespace(blocks=(), reason="no blocks"))
    with pytest.raises(alds.AldsError, match="no blocks"):
        peers.aa_svd(setting, 0.6, inputs)


def test_the_search_measures_one_layer_at_a_time(setting, inputs):
    names = ["model.layers.0.mlp.down_proj", "model.layers.2.self_attn.q_proj"]
    chosen = {name: setting.layers[name] for name in names}
    windows = torch.cat(setting.calibration[:2])
    found = search.sensitivities(setting.model, windows, chosen, inputs.size)
    for name, ratio in zip(names, (0.3, 0.6), strict=True):
        rank = layers.rank_at(chosen[name], ratio)
        factors = formulas.scaled(chosen[name].weight.detach(), inputs.size[name], rank)
        alone = layers.low_rank(setting.model, {name: factors})
        assert found[name][ratio] == pytest.approx(perplexity(alone, windows), rel=1e-9)
    with pytest.raises(alds.AldsError, match="5 windows"):
        search.sensitivities(setting.model, windows[:1].expand(5, -1), chosen, inputs.size)


def test_harmless_cuts_are_taken_first():
    two = {name: torch.nn.Linear(20, 20, bias=False) for name in "ab"}
    found = {"a": {0.5: 10.0, 0.9: 9.0}, "b": {0.5: 30.0, 0.9: 20.0}}
    assert search.ratios_within(found, two, 0.96) == {"a": 0.9, "b": 1.0}
    assert search.ratios_within(found, two, 0.75) == {"a": 0.5, "b": 1.0}
    assert search.ratios_within(found, two, 0.5) == {"a": 0.5, "b": 0.5}
    with pytest.raises(alds.AldsError, match=r"share=0.4 is less than all cuts leave, 0.500"):
        search.ratios_within(found, two, 0.4)


def test_windows_are_spread():
    assert spread(torch.arange(20).view(10, 2), 3, "text")[:, 0].tolist() == [0, 6, 12]
    with pytest.raises(alds.AldsError, match="text has 10 windows of 2 tokens, 11 are needed"):
        spread(torch.arange(20).view(10, 2), 11, "text")


def test_tuning_leaves_embeddings_alone(setting, inputs):
    small = peers.svd_llm(setting, 0.6, inputs)
    made = ours.tuned(setting, 0.6, small)
    assert torch.equal(made.model.embed_tokens.weight, setting.model.model.embed_tokens.weight)
    with torch.no_grad():
        before, after = (
            sum(map(float, (divergence(setting, net, b) for b in setting.calibration))) for net in (small, made)
        )
    assert after < before


def divergence(setting, net, batch):
    ours, wanted = (model(batch).logits.log_softmax(-1) for model in (net, setting.model))
    return (wanted.exp() * (wanted - ours)).sum()


@pytest.mark.slow
def test_one_command_does_every_method_and_goes_on(setting, tmp_path, capsys):
    shares, two = (0.8, 0.6), ["SVD-LLM", "ours, refitted"]
    half = run.run(setting, tmp_path, shares[:1], two)
    most = run.run(setting, tmp_path, shares[:1], list(methods.METHODS))
    rows = run.run(setting, tmp_path, shares, two)
    assert most[: len(half)] == half and rows[: len(most)] == most
    cells = [(row["method"], row["share"]) for row in rows if row["kind"] == "cell"]
    assert sorted(cells) == sorted([(name, 0.8) for name in methods.METHODS] + [(name, 0.6) for name in two])
    assert sorted(r["name"] for r in rows if r["kind"] == "statistics") == sorted(methods.STATISTICS)
    assert all(row["left"] <= row["share"] + 1e-9 for row in rows if row["kind"] == "cell")
    assert run.run(setting, tmp_path, shares, two) == rows
    table.write_results(rows, tmp_path)
    assert (tmp_path / "peers.png").stat().st_size > 10_000
    text = (tmp_path / "peers.md").read_text()
    assert all(f"| {name} |" in text for name in methods.METHODS)


def test_other_data_are_not_written_beside(setting, tmp_path):
    run.Run(setting, tmp_path).dense()
    other = Setting(setting.model, setting.include, setting.calibration[:4], setting.texts)
    with pytest.raises(alds.AldsError, match="other data or texts"):
        run.Run(other, tmp_path)
    (row,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert row["perplexity"] == {"one": pytest.approx(perplexity(setting.model, setting.texts["one"]))}


def test_seconds_are_those_of_the_whole_way():
    rows = [{"kind": "statistics", "name": "inputs", "seconds": 5.0}]
    for name, own in (("AA-SVD, layers alone", 20.0), ("AA-SVD", 300.0), ("ours, refined", 1.0)):
        rows.append({"kind": "cell", "method": name, "share": 0.8, "seconds": own})
    assert table.seconds(rows) == {("AA-SVD, layers alone", 0.8): 25.0, ("AA-SVD", 0.8): 325.0}


def test_shares_are_done_in_the_order_of_their_weight():
    assert run.ordered([0.4, 0.9, 0.5, 0.6, 0.8]) == [0.8, 0.6, 0.9, 0.4, 0.5]
