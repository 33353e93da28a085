"""Which tokens are padding: by keyword, by position, in dicts, by torch's convention, of encoder and decoder."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn

import alds_fast as alds
from alds_fast.errors import ArgumentError
from alds_fast.measurement import masks_of

TOKENS = torch.tensor([[1, 1, 1], [1, 0, 0]])


class Takes(nn.Module):
    def forward(self, input_ids, attention_mask=None, **others):
        return input_ids


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": TOKENS, "attention_mask": TOKENS},
        (TOKENS, TOKENS),
        [TOKENS, TOKENS],
        ({"input_ids": TOKENS, "attention_mask": TOKENS.bool()},),
        {"input_ids": {"text": {"attention_mask": TOKENS.float()}}},
        {"input_ids": TOKENS, "src_key_padding_mask": TOKENS == 0},
        {"input_ids": TOKENS, "key_padding_mask": torch.where(TOKENS == 0, -torch.inf, 0.0)},
    ],
)
def test_masks_are_taken_wherever_they_are(batch):
    masks = masks_of(Takes(), batch, "attention_mask")
    assert torch.equal(masks.first[0], TOKENS.bool()) and not masks.decoder
    assert not masks_of(Takes(), batch, None)


def test_other_names_and_none():
    batch = {"input_ids": TOKENS, "keep": TOKENS, "my_key_padding_mask": TOKENS}
    assert torch.equal(masks_of(Takes(), batch, "keep").first[0], TOKENS.bool())
    assert torch.equal(masks_of(Takes(), batch, "my_key_padding_mask").first[0], TOKENS == 0)
    assert not masks_of(Takes(), batch, "attention_mask") and not masks_of(Takes(), TOKENS, "attention_mask")


def test_layers_of_a_decoder_go_by_its_own_mask():
    first, decoder = torch.ones(2, 3), torch.tensor([[1, 1, 0], [1, 0, 0]])
    masks = masks_of(Takes(), {"attention_mask": first, "decoder_attention_mask": decoder}, "attention_mask")
    for name in (
        "encoder.block.0.q",
        "decoder.block.0.EncDecAttention.k",
        "model.decoder.layers.1.encoder_attn.v_proj",
    ):
        assert torch.equal(masks.of(name)[0][0], first.bool())
    for name in ("decoder.block.0.SelfAttention.k", "decoder.block.0.EncDecAttention.q", "model.decoder.layers.1.fc1"):
        assert torch.equal(masks.of(name)[0][0], decoder.bool())


def test_what_is_no_mask_is_refused():
    for name, value in (
        ("attention_mask", torch.full((2, 1, 3, 3), 2)),
        ("src_key_padding_mask", torch.tensor([[0, 2]])),
    ):
        with pytest.raises(ArgumentError, match=rf"{name}: expected \(samples, tokens\)"):
            masks_of(Takes(), {name: value}, "attention_mask")


def test_rows_of_an_encoder_and_a_decoder_of_one_length():
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 50}
    model = transformers.BartModel(transformers.BartConfig(**sizes))
    ids, kept = torch.randint(3, 50, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    kept[0, 2:] = 0
    batch = {"input_ids": ids, "attention_mask": kept, "decoder_input_ids": ids}
    batch["decoder_attention_mask"] = torch.ones(2, 5, dtype=torch.long)
    rows = {n: m.rows for n, m in alds.analyze(model, data=[batch], held_out=0).moments.items()}
    assert rows["encoder.layers.0.fc1"] == rows["decoder.layers.0.encoder_attn.k_proj"] == 7
    assert rows["decoder.layers.0.fc1"] == rows["decoder.layers.0.encoder_attn.q_proj"] == 10


def test_a_padded_encoder_of_torch_counts_its_tokens_by_default():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    padding = torch.arange(9).expand(2, 9) >= 4
    analysis = alds.analyze(encoder, data=[{"src": torch.randn(2, 9, 16), "src_key_padding_mask": padding}], held_out=0)
    assert analysis.moments["layers.0.linear1"].rows == 8


class Pads(nn.Module):
    def forward(self, x, padding_mask=None, mask=None, src_mask=None):
        return x


def test_names_with_pad_are_padding_and_one_row_is_for_all_samples():
    batch = {"x": torch.ones(2, 3, 4), "padding_mask": torch.tensor([[False, False, True]])}
    expected = torch.tensor([[True, True, False]] * 2)
    assert torch.equal(masks_of(Pads(), batch, "padding_mask").first[0], expected)
    batch = {"input_ids": TOKENS, "attention_mask": [[1, 1, 0]]}
    assert torch.equal(masks_of(Takes(), batch, "attention_mask").first[0], expected)


@pytest.mark.parametrize(
    ("name", "value", "sense"),
    [("padding_mask", TOKENS == 0, "True at padding"), ("mask", TOKENS, "1 at tokens")],
)
def test_what_looks_like_a_mask_and_is_not_named_is_warned_of(name, value, sense):
    batch = {"x": torch.ones(2, 3, 4), name: value}
    with pytest.warns(UserWarning, match=f"{name} looks like a mask of padding.*mask='{name}'.*{sense}"):
        assert not masks_of(Pads(), batch, "attention_mask")
    assert torch.equal(masks_of(Pads(), batch, name).first[0], TOKENS.bool())


def test_masks_of_attention_are_not_warned_of(recwarn):
    masks_of(Pads(), {"x": torch.ones(3, 3, 4), "src_mask": torch.ones(3, 3).tril()}, "attention_mask")
    masks_of(Pads(), {"x": torch.ones(3, 3, 4), "mask": TOKENS}, None)
    assert not recwarn.list


def test_the_encoders_mask_does_not_hold_for_a_decoder_with_tokens_of_its_own():
    batch = {"input_ids": TOKENS, "attention_mask": TOKENS, "decoder_input_ids": TOKENS}
    masks = masks_of(Takes(), batch, "attention_mask")
    assert masks.of("model.decoder.layers.0.fc1") == ((), ())
    for name in ("model.encoder.layers.0.fc1", "model.decoder.layers.0.encoder_attn.k_proj"):
        assert torch.equal(masks.of(name)[0][0], TOKENS.bool())


class Pair(NamedTuple):
    ids: torch.Tensor
    attention_mask: torch.Tensor


@dataclass
class Inputs:
    ids: torch.Tensor
    attention_mask: torch.Tensor


@pytest.mark.parametrize("kind", [Pair, Inputs, lambda x, m: {"attention_mask": m}])
def test_masks_in_what_arguments_hold(kind):
    ids, mask = torch.zeros(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]])
    for batch in ((kind(ids, mask),), {"x": (ids, [kind(ids, mask)])}):
        assert torch.equal(masks_of(Takes(), batch, "attention_mask").first[0], mask.bool())


@pytest.mark.parametrize("form", ["bool", "int", "inf", "least", "heads"])
def test_masks_of_which_token_sees_which_say_what_is_padding(form):
    keep = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    seen = (keep[:, None] & torch.ones(4, 4).tril().bool())[:, None]
    low = -torch.inf if form == "inf" else torch.finfo(torch.float32).min
    value = {"bool": seen, "int": seen.long(), "heads": seen.expand(2, 3, 4, 4)}.get(form)
    value = torch.zeros(2, 1, 4, 4).masked_fill(~seen, low) if value is None else value
    batch = {"x": torch.zeros(2, 4), "attention_mask": value}
    assert torch.equal(masks_of(Takes(), batch, "attention_mask").first[0], keep)
    with pytest.raises(ArgumentError, match="attention_mask"):
        masks_of(Takes(), batch | {"attention_mask": torch.full((2, 1, 4, 4), -0.5)}, "attention_mask")
    nothing_hidden = masks_of(Takes(), batch | {"attention_mask": torch.zeros(2, 1, 4, 4)}, "attention_mask")
    assert bool(nothing_hidden.first[0].all())


class Towers(nn.Module):
    """Two texts through one layer, or each through its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, first, second, own=False):
        return self.a(first["x"]).sum() + (self.b if own else self.a)(second["x"]).sum()


def text(length, tokens):
    mask = (torch.arange(tokens) < length).long().expand(4, tokens)
    return {"x": torch.randn(4, tokens, 8), "attention_mask": mask}


def test_two_texts_have_each_its_own_mask():
    one, two = text(2, 6), text(5, 9)
    moments = alds.analyze(Towers(), data=[(one, two)], held_out=0).moments
    assert moments["a"].rows == 4 * (2 + 5)
    moments = alds.analyze(Towers(), data=[(one, two, True)], held_out=0).moments
    assert (moments["a"].rows, moments["b"].rows) == (8, 20)


def test_masks_that_cannot_be_told_apart_are_said():
    with pytest.warns(UserWarning, match="several masks of one batch fit layer 'a', so that all its tokens count"):
        moments = alds.analyze(Towers(), data=[(text(2, 8), text(6, 8))], held_out=0).moments
    assert moments["a"].rows == 64
    alike = text(3, 8)
    assert alds.analyze(Towers(), data=[(alike, alike)], held_out=0).moments["a"].rows == 24


def test_masks_that_fit_nothing_are_said():
    class WithToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x, attention_mask):
            return self.a(torch.cat([x[:, :1], x], 1))

    with pytest.warns(UserWarning, match="the masks of data= fit the input of no layer: all tokens count"):
        moments = alds.analyze(WithToken(), data=[text(2, 6)], held_out=0).moments
    assert moments["a"].rows == 4 * 7


@pytest.mark.parametrize("tokens", [6, 8])
def test_tokens_come_first_where_the_model_says_so(tokens):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Linear(16, 16)
            self.m = nn.TransformerEncoderLayer(16, 4, 16)  # (tokens, samples, 16)

        def forward(self, src, src_key_padding_mask):
            return self.m(self.p(src), src_key_padding_mask=src_key_padding_mask)

    x = torch.ones(tokens, 8, 16)
    x[2:] = 100.0
    padding = (torch.arange(tokens) > 1).expand(8, tokens)
    batch = {"src": x, "src_key_padding_mask": padding}
    moments = alds.analyze(Encoder().eval(), data=[batch], held_out=0).moments
    assert moments["p"].rows == 16 and float(moments["p"].second.max()) == 1.0
