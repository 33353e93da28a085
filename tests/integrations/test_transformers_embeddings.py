"""Resizing the vocabulary of a model whose output layer is low-rank: refused before anything is changed."""

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast.errors import ModelError
from alds_fast.integrations import check_resizing

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[3, 4, 5]])


def llama():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=97)).eval()


@pytest.fixture
def small():
    model = alds.compress(llama(), params=0.4, include="*")
    assert isinstance(model.lm_head, alds.LowRankLinear)
    return model


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({"new_num_tokens": 101}, 101), ({"new_num_tokens": 90}, 90), ({"pad_to_multiple_of": 8}, 104)],
)
@pytest.mark.parametrize("form", [lambda model: model, alds.to_plain])
def test_resizing_a_low_rank_head_is_refused(small, form, options, wanted):
    model = form(small)
    with torch.no_grad():
        before = model(IDS).logits
    message = rf"layer 'lm_head' is low-rank and cannot be resized from 97 to {wanted} tokens; .*to_dense\(\).*exclude"
    with pytest.raises(ModelError, match=message):
        model.resize_token_embeddings(**options)
    assert model.get_input_embeddings().weight.shape[0] == 97 and model.config.vocab_size == 97
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)


def test_what_the_message_says_works(small):
    small.set_output_embeddings(small.get_output_embeddings().to_dense())
    small.resize_token_embeddings(101)
    assert small.lm_head.weight.shape == (101, 64) and small(IDS).logits.shape == (1, 3, 101)
    other = alds.compress(llama(), params=0.5, exclude=["lm_head"])
    other.resize_token_embeddings(101)
    assert type(other.lm_head) is nn.Linear and other(IDS).logits.shape == (1, 3, 101)


def test_sizes_that_change_nothing_are_fine(small):
    assert small.resize_token_embeddings().weight.shape[0] == 97
    small.resize_token_embeddings(97)
    check_resizing(small, 90, 97)
    base = alds.compress(llama(), params=0.4, include="*").model  # no output layer
    assert base.resize_token_embeddings(101).weight.shape[0] == 101
