"""Architectures of transformers: configurations of few layers, with the shapes that make each what it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import alds_fast as alds

from .case import Case, image, tokens

VOCABULARY = 500
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE |= {"vocab_size": VOCABULARY, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"num_key_value_heads": 2, "head_dim": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
HEADED = {"d_model": 256, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
HEADED |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "vocab_size": VOCABULARY}
HEADED |= {"use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
T5 = {"d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
PICTURE = {"image_size": 64, "patch_size": 16}
SPEECH = {"conv_dim": (64,) * 3, "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2), "num_feat_extract_layers": 3}
SPEECH |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0}
TWO_TOWERS = {
    "text_config": WIDE | {"max_position_embeddings": 64},
    "vision_config": {
        n: WIDE[n] for n in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    | PICTURE,
}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", WIDE | GROUPED),
    "mistral": ("MistralForCausalLM", WIDE | GROUPED),
    "qwen2": ("Qwen2ForCausalLM", WIDE | GROUPED),
    "qwen3": ("Qwen3ForCausalLM", WIDE | GROUPED),
    "gemma": ("GemmaForCausalLM", WIDE | GROUPED),
    "gemma2": ("Gemma2ForCausalLM", WIDE | GROUPED),
    "gemma3": ("Gemma3ForCausalLM", WIDE | GROUPED),
    "phi": ("PhiForCausalLM", WIDE),
    "phi3": ("Phi3ForCausalLM", WIDE | GROUPED),
    "olmo": ("OlmoForCausalLM", WIDE),
    "olmo2": ("Olmo2ForCausalLM", WIDE),
    "granite": ("GraniteForCausalLM", WIDE | GROUPED),
    "stablelm": ("StableLmForCausalLM", WIDE | GROUPED),
    "starcoder2": ("Starcoder2ForCausalLM", WIDE | GROUPED),
    "cohere": ("CohereForCausalLM", WIDE | GROUPED),
    "smollm3": ("SmolLM3ForCausalLM", WIDE | GROUPED),
    "glm4": ("Glm4ForCausalLM", WIDE | GROUPED),
    "exaone4": ("Exaone4ForCausalLM", WIDE | GROUPED),
    "nemotron": ("NemotronForCausalLM", WIDE | GROUPED),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 256, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY,
             "use_cache": False}),
    "gpt_neox": ("GPTNeoXForCausalLM", WIDE),
    "gpt_neo": ("GPTNeoForCausalLM", {"hidden_size": 256, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY,
                "attention_types": [[["global", "local"], 1]], "use_cache": False}),
    "gptj": ("GPTJForCausalLM", {"n_embd": 256, "n_layer": 2, "n_head": 4, "rotary_dim": 32, "vocab_size": VOCABULARY,
             "use_cache": False}),
    "codegen": ("CodeGenForCausalLM", {"n_embd": 256, "n_layer": 2, "n_head": 4, "rotary_dim": 32,
                "vocab_size": VOCABULARY, "use_cache": False}),
    "opt": ("OPTForCausalLM", WIDE | {"ffn_dim": 512, "word_embed_proj_dim": 256, "max_position_embeddings": 64}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 256, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY,
              "use_cache": False}),
    "falcon": ("FalconForCausalLM", WIDE),
    "mpt": ("MptForCausalLM", {"d_model": 256, "n_heads": 4, "n_layers": 2, "vocab_size": VOCABULARY,
            "use_cache": False}),
    "mamba": ("MambaForCausalLM", WIDE | {"state_size": 8}),
    "mamba2": ("Mamba2ForCausalLM", WIDE | {"num_heads": 8, "head_dim": 64, "n_groups": 2, "state_size": 16}),
    "mixtral": ("MixtralForCausalLM", WIDE | GROUPED | {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", WIDE | GROUPED | EXPERTS),
    "gpt_oss": ("GptOssForCausalLM", WIDE | GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", WIDE | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
                    "topk_group": 1, "moe_intermediate_size": 128, "kv_lora_rank": 64, "q_lora_rank": 96,
                    "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64, "first_k_dense_replace": 1}),
    "granitemoe": ("GraniteMoeForCausalLM", WIDE | GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", WIDE),
    "roberta": ("RobertaForMaskedLM", WIDE),
    "distilbert": ("DistilBertModel", {"dim": 256, "hidden_dim": 512, "n_layers": 2, "n_heads": 4,
                   "vocab_size": VOCABULARY}),
    "albert": ("AlbertModel", WIDE | {"embedding_size": 64}),
    "electra": ("ElectraForPreTraining", WIDE | {"embedding_size": 64}),
    "deberta-v2": ("DebertaV2Model", WIDE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "mpnet": ("MPNetModel", WIDE),
    "xlnet": ("XLNetModel", {"d_model": 256, "d_inner": 512, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}),
    "longformer": ("LongformerModel", WIDE | {"attention_window": 4}),
    "modernbert": ("ModernBertModel", WIDE),
    "funnel": ("FunnelModel", {"d_model": 256, "d_inner": 512, "d_head": 64, "n_head": 4, "block_sizes": [1, 1],
               "num_decoder_layers": 1, "vocab_size": VOCABULARY}),
}  # fmt: skip
SEQUENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", T5 | {"use_cache": False}),
    "bart": ("BartForConditionalGeneration", HEADED),
    "marian": ("MarianMTModel", HEADED),
    "pegasus": ("PegasusForConditionalGeneration", HEADED),
    "m2m_100": ("M2M100ForConditionalGeneration", HEADED),
}
PICTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", WIDE | PICTURE),
    "deit": ("DeiTModel", WIDE | PICTURE),
    "beit": ("BeitModel", WIDE | PICTURE | {"use_relative_position_bias": True}),
    "dinov2": ("Dinov2Model", WIDE | PICTURE),
    "swin": ("SwinModel", {"image_size": 64, "patch_size": 4, "embed_dim": 48, "depths": [2, 2], "num_heads": [2, 4],
             "window_size": 4}),
    "swinv2": ("Swinv2Model", {"image_size": 64, "patch_size": 4, "embed_dim": 48, "depths": [2, 2],
               "num_heads": [2, 4], "window_size": 4}),
    "segformer": ("SegformerForSemanticSegmentation", {}),
    "convnext": ("ConvNextModel", {"hidden_sizes": [64, 128, 256], "depths": [1, 1, 1], "num_stages": 3}),
    "resnet": ("ResNetForImageClassification", {}),
    "mobilevit": ("MobileViTModel", {"image_size": 64}),
    "levit": ("LevitModel", {"image_size": 64}),
    "siglip-vision": ("SiglipVisionModel", WIDE | PICTURE),
    "dpt": ("DPTForDepthEstimation", WIDE | PICTURE | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [32, 64, 128, 256], "fusion_hidden_size": 64}),
}  # fmt: skip


def _build(model: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    kind: Any = getattr(transformers, model)
    built: nn.Module = kind(kind.config_class(**options))
    return built


def _opened(model: str, options: dict[str, Any]) -> nn.Module:
    return alds.open_experts(_build(model, options))


def _words() -> Tensor:
    return tokens(16, VOCABULARY) % (VOCABULARY - 3) + 3  # none of the special ones


def _read() -> dict[str, Tensor]:
    return {"input_ids": _words()}


def _translated() -> dict[str, Tensor]:
    return {"input_ids": _words(), "decoder_input_ids": _words()}


def _seen() -> dict[str, Tensor]:
    return {"pixel_values": image(64)}


def _described() -> dict[str, Tensor]:
    words = _words()
    words[:, -1] = 2
    return {"input_ids": words, "pixel_values": image(64, 2), "attention_mask": torch.ones_like(words)}


def _heard() -> dict[str, Tensor]:
    return {"input_values": torch.randn(1, 4000, device="cpu")}


def _transcribed() -> dict[str, Tensor]:
    return {"input_features": torch.randn(1, 80, 128, device="cpu"), "decoder_input_ids": _words()[:1]}


OTHERS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
    "whisper": ("WhisperForConditionalGeneration", HEADED | {"max_source_positions": 64}, _transcribed),
    "wav2vec2": ("Wav2Vec2ForCTC", WIDE | SPEECH, _heard),
    "hubert": ("HubertModel", WIDE | SPEECH, _heard),
    "clip": ("CLIPModel", TWO_TOWERS, _described),
    "siglip": ("SiglipModel", TWO_TOWERS, _described),
    "detr": ("DetrForObjectDetection", HEADED | {"use_timm_backbone": False, "backbone": None, "num_queries": 10},
             _seen),
}  # fmt: skip
MIXTURES = "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe"
GIVEN = [(DECODERS, _read), (ENCODERS, _read), (SEQUENCES, _translated), (PICTURES, _seen)]

CASES = [
    *(
        Case(f"transformers/{n}", partial(_build, *of), inputs)
        for table, inputs in GIVEN for n, of in table.items()
    ),
    *(Case(f"transformers/{n}, open_experts", partial(_opened, *DECODERS[n]), _read) for n in MIXTURES),
    *(Case(f"transformers/{n}", partial(_build, *of), inputs) for n, (*of, inputs) in OTHERS.items()),
]  # fmt: skip
