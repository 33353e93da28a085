"""Small checkpoint directories of transformers models, with spectra that fall."""

import json
from pathlib import Path

import torch
import transformers

from alds_fast.checkpoints.safetensors_reader import open_shards

OPTIONS = {"params": 0.7, "max_shard_bytes": 60_000}
_SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_SMALL, "hidden_size": 64, "intermediate_size": 176, "num_key_value_heads": 2, "vocab_size": 96}
_ENCODER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def _build(kind):
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER, tie_word_embeddings=True))
    if kind == "deep":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_DECODER, "num_hidden_layers": 4}))
    if kind == "qwen":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_DECODER))
    if kind == "gpt2":
        sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 96, "n_positions": 32}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**_ENCODER, vocab_size=96))
    assert kind == "vit"
    return transformers.ViTForImageClassification(transformers.ViTConfig(**_ENCODER, image_size=32, patch_size=8))


@torch.no_grad()
def dense(kind, dtype=torch.float32):
    """The model, random, in evaluation mode; singular values of its matrices fall like 1 / i."""
    torch.manual_seed(0)
    model = _build(kind)
    for p in model.parameters():
        if p.dim() == 2 and min(p.shape) > 8:
            u, s, v = torch.linalg.svd(p, full_matrices=False)
            p.copy_(2 * (u * (s[0] / torch.arange(1, len(s) + 1))) @ v)
    return model.to(dtype).eval()


def make(kind, folder, dtype=torch.float32, shards=True):
    """Save the model to a directory, in several files or one, with a tokenizer's file beside it; returns the model."""
    model = dense(kind, dtype)
    model.save_pretrained(folder, max_shard_size="100KB" if shards else "1GB")
    (Path(folder) / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    return model


def inputs(kind):
    """Keyword arguments of a call."""
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    return {"input_ids": torch.randint(96, (2, 16), generator=generator)}


def contents(folder):
    """Every file of a directory, hidden ones too, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def first_shard(folder):
    return min(Path(folder).glob("*.safetensors"))


def poison(folder, value):
    """Set the first entry of a layer's weight in its file; returns the layer's name and what was there."""
    name = "model.layers.1.mlp.up_proj"
    stored = open_shards(folder).tensors[f"{name}.weight"]
    with open(stored.file, "r+b") as file:
        file.seek(stored.start)
        old = file.read(4)
        file.seek(stored.start)
        file.write(value)
    return name, old
