"""Which layers of transformers' models are output heads, in memory and in checkpoint directories."""

import pytest
import transformers
from support import checkpoints
from support.marks import slow

import alds_fast as alds
from alds_fast.layers import chosen_layers

_SIZES = {**checkpoints._ENCODER, "vocab_size": 96}
_UNTIED = {**checkpoints._DECODER, "tie_word_embeddings": False}
_WAV2VEC2 = {**checkpoints._ENCODER, "vocab_size": 32, "conv_dim": (32, 32), "conv_stride": (5, 2),
             "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
             "num_feat_extract_layers": 2}  # fmt: skip
HEADS = {
    "LlamaForCausalLM": (transformers.LlamaConfig(**_UNTIED), "lm_head"),
    "GPTNeoXForCausalLM": (transformers.GPTNeoXConfig(**_SIZES, tie_word_embeddings=False), "lm_head"),
    "BertForMaskedLM": (transformers.BertConfig(**_SIZES, tie_word_embeddings=False), "cls.predictions.decoder"),
    "BioGptForCausalLM": (transformers.BioGptConfig(**_SIZES, tie_word_embeddings=False), "output_projection"),
    "LlamaForSequenceClassification": (transformers.LlamaConfig(**_UNTIED, num_labels=20, pad_token_id=0), None),
    "BertForSequenceClassification": (transformers.BertConfig(**_SIZES, num_labels=20), None),
    "ViTForImageClassification": (transformers.ViTConfig(**checkpoints._ENCODER, image_size=32, patch_size=8), None),
    "Wav2Vec2ForCTC": (transformers.Wav2Vec2Config(**_WAV2VEC2), None),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_language_models_only(name):
    config, head = HEADS[name]
    layers = chosen_layers(getattr(transformers, name)(config))
    assert [layer.name for layer in layers if "output head" in (layer.reason or "")] == [head] * (head is not None)


@pytest.mark.parametrize("kind", ["llama", slow("gpt2"), "qwen"])
def test_directories_and_models_in_memory_agree(kind, tmp_path):
    """llama and gpt2 tie their heads, qwen does not."""
    model = checkpoints.make(kind, tmp_path / "dense", shards=False)
    plan = alds.compress_checkpoint(tmp_path / "dense", tmp_path / "small", params=0.8).plan
    same = alds.analyze(model).plan(params=0.8)
    for rows in (plan.layers, same.layers):
        row = next(row for row in rows if row.name == "lm_head")
        assert (
            row.rank is None and ("output head of a language model" if kind == "qwen" else "stays tied") in row.reason
        )


def test_a_directory_whose_head_was_asked_for_loads(tmp_path):
    checkpoints.make("qwen", tmp_path / "dense", shards=False)
    alds.compress_checkpoint(tmp_path / "dense", tmp_path / "small", params=0.5, include="*")
    assert isinstance(alds.from_pretrained(tmp_path / "small").lm_head, alds.LowRankLinear)
