"""Text that a model writes itself: drawn from its own probabilities, and the same for the same seed."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import alds_fast as alds
from alds_fast.errors import ArgumentError, ModelError

WORDS = 11


def writer():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=3, bos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


STARTS = [torch.arange(4, 10)[None], {"input_ids": torch.tensor([[9, 8, 7, 6, 5, 4]])}, torch.tensor([[5]])]


def test_sequences_begin_like_the_starts_and_are_of_one_length():
    model = writer().train()
    before = torch.get_rng_state()
    told = []
    text = alds.own_text(model, STARTS, count=5, length=12, prompt=3, together=2, progress=lambda *to: told.append(to))
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert [batch["input_ids"].shape for batch in text] == [(1, 12)] * 5
    begun = {tuple(batch["input_ids"][0, :3].tolist()) for batch in text}
    assert (
        begun <= {(a, a + 1, a + 2) for a in range(4, 8)} | {(a, a - 1, a - 2) for a in range(6, 10)} and len(begun) > 1
    )
    assert told == [("sequences written", n, 5) for n in (2, 4, 5)]


def test_a_seed_gives_the_same_text_and_another_seed_another():
    def text(seed):
        written = alds.own_text(writer(), STARTS, count=3, length=9, prompt=2, seed=seed)
        return torch.cat([batch["input_ids"] for batch in written])

    assert torch.equal(text(0), text(0)) and not torch.equal(text(0), text(1))


def test_tokens_are_drawn_by_the_model_s_own_probabilities():
    model, start = writer().eval(), torch.tensor([[7, 4]])
    with torch.no_grad():
        logits = model(start).logits[0, -1]
    logits[3] = -torch.inf  # the end
    wanted = logits.softmax(0)
    model.generation_config.repetition_penalty, model.generation_config.top_k = 3.0, 2  # of the model's own, not used
    text = alds.own_text(model, [start], count=4000, length=3, prompt=2, together=4000)
    found = torch.bincount(torch.cat([batch["input_ids"][:, 2] for batch in text]), minlength=WORDS) / 4000
    spread = (wanted * (1 - wanted) / 4000).sqrt()
    assert 0.2 < float(wanted.max()) < 0.9 and bool(((found - wanted).abs() <= 5 * spread).all()) and found[3] == 0


def test_a_compressed_model_is_distilled_on_it():
    model = writer().eval()
    small = alds.compress(model, params=0.9)
    text = alds.own_text(model, STARTS, count=16, length=24, prompt=2)
    _, told = alds.distill(small, model, text, epochs=4, lr=1e-2, progress=False)
    assert told.kl and told.after < told.before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count=0 is not an integer >= 1"),
        ({"length": 4, "prompt": 4}, "length=4 is not an integer >= 5"),
        ({"length": 65}, "length=65 is above the 64 positions"),
        ({"prompt": 7, "length": 9}, "starts have no sequence of prompt=7 tokens"),
        ({"starts": [torch.zeros(1, 4)]}, "starts holds a Tensor: expected integer tensors"),
        ({"starts": ["text"]}, "starts holds a str: expected integer tensors"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        alds.own_text(writer(), **{"starts": STARTS, "prompt": 2, "length": 8, **options})


def test_models_that_cannot_write_are_refused():
    with pytest.raises(ModelError, match="Linear has no generate"):
        alds.own_text(nn.Linear(2, 2), STARTS)
    config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="has an encoder"):
        alds.own_text(T5ForConditionalGeneration(config), STARTS)
