"""Output heads of language models are left dense unless they are asked for."""

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast.layers import chosen_layers

REASON = 'output head of a language model; include="*" decomposes it with all others'


class Decoder(nn.Module):
    """As transformers' models say which layer gives the scores of tokens."""

    def __init__(self, tied=False, head=None):
        super().__init__()
        self.embed, self.body = nn.Embedding(40, 16), nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 40, bias=False) if head is None else head
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        return self.lm_head(self.body(self.embed(ids)))


class Broken(Decoder):
    def get_output_embeddings(self):
        raise NotImplementedError


class Classifier(Decoder):
    def __init__(self):
        super().__init__()
        self.score = nn.Linear(16, 4)

    def get_output_embeddings(self):
        return None


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.lm_head = inner, nn.Linear(16, 16)


def reasons(model, **patterns):
    return {layer.name: layer.reason for layer in chosen_layers(model, **patterns)}


@pytest.mark.parametrize("wrap, prefix", [(lambda m: m, ""), (Wrapper, "inner.")])
def test_the_head_stays_dense(wrap, prefix):
    """Of the model, or of one inside it: not everything that is called lm_head is one."""
    model = wrap(Decoder())
    why = reasons(model)
    assert why[f"{prefix}lm_head"] == REASON and why[f"{prefix}body"] is None
    assert prefix == "" or why["lm_head"] is None
    row = next(row for row in alds.analyze(model).plan(params=0.9).layers if row.name == f"{prefix}lm_head")
    assert row.rank is None and row.reason == REASON


@pytest.mark.parametrize("include", ["lm_head", "*", ["body", "lm_*"]])
def test_a_pattern_that_matches_it_asks_for_it(include):
    assert reasons(Decoder(), include=include)["lm_head"] is None


def test_a_pattern_that_does_not_match_it_leaves_it_out():
    assert reasons(Decoder(), include="body")["lm_head"] == "not matched by include="
    assert reasons(Decoder(), exclude="lm_head")["lm_head"] == "matched by exclude="


def test_a_tied_head_says_that_it_is_tied():
    assert "shared with 'embed.weight'" in reasons(Decoder(tied=True))["lm_head"]


def test_a_head_of_several_layers():
    model = Decoder(head=nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 40)))
    assert reasons(model)["lm_head.0"] == reasons(model)["lm_head.2"] == REASON


@pytest.mark.parametrize("model", [Broken(), Classifier()])
def test_other_models_have_no_output_head(model):
    """One that cannot say which layer it is, and one for classification."""
    why = reasons(model)
    assert why["lm_head"] is None and why.get("score") is None


def test_what_was_asked_for_is_applied_saved_and_loaded(tmp_path):
    model = Decoder()
    small = alds.compress(model, params=0.7, include="lm_head")
    assert isinstance(small.lm_head, alds.LowRankLinear)
    alds.save(small, tmp_path / "small.safetensors")
    loaded = alds.load(tmp_path / "small.safetensors", Decoder)
    ids = torch.arange(8)
    with torch.no_grad():
        assert torch.equal(loaded(ids), small(ids))


class ByHand(nn.Module):
    """A language model without methods that name its head."""

    def __init__(self, outputs):
        super().__init__()
        self.embed, self.positions = nn.Embedding(40, 16), nn.Embedding(16, 16)
        self.body, self.out = nn.Linear(16, 16), nn.Linear(16, outputs, bias=False)

    def forward(self, ids):
        return self.out(self.body(self.embed(ids)))


def test_a_head_that_no_method_names_is_known_by_its_size():
    by_size = f"has an output for every entry of an embedding, as an {REASON}"
    assert reasons(ByHand(40))["out"] == by_size and reasons(ByHand(40))["body"] is None
    assert reasons(ByHand(39))["out"] is None
    assert {layer.name: layer.reason for layer in alds.analyze(ByHand(40), include="*").layers}["out"] is None


@pytest.mark.parametrize(("entries", "width", "outputs"), [(10, 32, 50), (40, 64, 64), (256, 256, 256), (100, 32, 111)])
def test_last_layers_that_only_look_like_heads_are_decomposed(entries, width, outputs):
    """Classes beside a table of kinds, a hidden layer as wide as a table of positions."""
    layers = nn.Embedding(entries, width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    assert reasons(nn.Sequential(*layers, nn.Linear(width, outputs)))["3"] is None


@pytest.mark.parametrize(("entries", "width", "outputs"), [(65, 128, 65), (250, 64, 256), (50257, 8, 50304)])
def test_heads_of_few_symbols_and_of_padded_vocabularies(entries, width, outputs):
    layers = nn.Embedding(entries, width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    model = nn.Sequential(*layers, nn.Linear(width, outputs))
    assert "has an output for every entry" in reasons(model)["3"] and reasons(model)["1"] is None
