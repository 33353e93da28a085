"""A model that was saved and loaded gives the same outputs to the last bit, whatever its family."""

import functools

import pytest
import torch
import transformers
from support.marks import slow

import alds_fast as alds
from alds_fast.layers import LowRankLayer

_ENCODER = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 68}
_TEXT = {**_ENCODER, "vocab_size": 51, "pad_token_id": 0}
_SHAPES = {"hidden_sizes": [10, 22], "depths": [1, 1], "num_channels": 3}
_SPEECH = {"vocab_size": 12, "conv_dim": (20, 20), "conv_stride": (5, 2), "conv_kernel": (10, 3),
           "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}  # fmt: skip
CONFIGS = {
    "ResNetForImageClassification": {**_SHAPES, "embedding_size": 10},
    "ConvNextForImageClassification": {**_SHAPES, "num_stages": 2},
    "RegNetForImageClassification": {**_SHAPES, "embedding_size": 10, "groups_width": 2},
    "MobileNetV2ForImageClassification": {"depth_multiplier": 0.35, "image_size": 32},
    "EfficientNetForImageClassification": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "image_size": 32,
                                           "hidden_dim": 320},
    "MobileNetV1ForImageClassification": {"depth_multiplier": 0.1, "image_size": 32},
    "PoolFormerForImageClassification": {"hidden_sizes": [10, 22, 26, 30], "depths": [1, 1, 1, 1]},
    "SegformerForSemanticSegmentation": {"hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 1, 1],
                                         "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 22},
    "SwinForImageClassification": {"image_size": 32, "embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2],
                                   "window_size": 4},
    "ViTForImageClassification": {**_ENCODER, "image_size": 32, "patch_size": 8},
    "BertForSequenceClassification": _TEXT,
    "LlamaForCausalLM": _TEXT,
    "GPT2LMHeadModel": {"n_layer": 2, "n_embd": 36, "n_head": 2, "vocab_size": 51},
    "Wav2Vec2ForCTC": {**_ENCODER, **_SPEECH},
}  # fmt: skip
FAST = ("ResNetForImageClassification", "BertForSequenceClassification", "Wav2Vec2ForCTC")


@functools.cache
def compressed(name):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**CONFIGS[name])).eval()
    return model, alds.compress(model, params=0.6)


def outputs(model):
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "input_ids":
        batch = torch.randint(51, (2, 9), generator=generator)
    else:
        batch = torch.randn(
            (2, 3, 32, 32) if model.main_input_name == "pixel_values" else (2, 400), generator=generator
        )
    with torch.no_grad():
        return model(batch).logits


def check_memory(model):
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.numel():
            assert tensor.data_ptr() % 64 == 0, name
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


EACH = [name if name in FAST else slow(name) for name in CONFIGS]


@pytest.mark.parametrize("name", EACH)
def test_load(name, tmp_path):
    model, small = compressed(name)
    check_memory(small)
    alds.save(small, tmp_path / "small.safetensors")
    loaded = alds.load(tmp_path / "small.safetensors", model)
    assert any(isinstance(m, LowRankLayer) for m in loaded.modules())
    check_memory(loaded)
    assert torch.equal(outputs(loaded), outputs(small))


@pytest.mark.parametrize("name", EACH)
def test_from_pretrained(name, tmp_path):
    _, small = compressed(name)
    small.save_pretrained(tmp_path / "small")
    loaded = alds.from_pretrained(tmp_path / "small")
    assert any(isinstance(m, LowRankLayer) for m in loaded.modules())
    check_memory(loaded)
    assert torch.equal(outputs(loaded), outputs(small))
