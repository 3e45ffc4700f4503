"""Tiny random models of many architectures, built in memory; tiny.py writes model directories."""

import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


SHAPE = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
_LLAMA4 = SHAPE | {"head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2}


def _seeded(model_class: type[PreTrainedModel], config) -> PreTrainedModel:
    torch.manual_seed(0)
    return model_class(config).eval()


def llama(**config) -> PreTrainedModel:
    return _seeded(LlamaForCausalLM, LlamaConfig(**SHAPE | config))


def gpt2(**config) -> PreTrainedModel:
    return _seeded(GPT2LMHeadModel, GPT2Config(**{"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4} | config))


def bloom() -> PreTrainedModel:
    return _seeded(BloomForCausalLM, BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4))


def opt() -> PreTrainedModel:
    """OPT-350m's way: states of 32, embeddings and LM head of 16."""
    shape = {key: value for key, value in SHAPE.items() if key not in ("intermediate_size", "num_key_value_heads")}
    return _seeded(OPTForCausalLM, OPTConfig(**shape, ffn_dim=64, word_embed_proj_dim=16, max_position_embeddings=64))


def bert() -> PreTrainedModel:
    """A layer stands between its states and the LM head."""
    return _seeded(BertLMHeadModel, BertConfig(**SHAPE, is_decoder=True))


def gemma2() -> PreTrainedModel:
    return _seeded(Gemma2ForCausalLM, Gemma2Config(**SHAPE, head_dim=8))


def gemma3() -> PreTrainedModel:
    """With a vision tower."""
    layers = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    tokens = {"boi_token_index": 10, "eoi_token_index": 11, "image_token_index": 12, "mm_tokens_per_image": 4}
    return _seeded(
        Gemma3ForConditionalGeneration, Gemma3Config(text_config=SHAPE | layers, vision_config=vision, **tokens)
    )


def qwen_vl() -> PreTrainedModel:
    """Several axes of positions."""
    text = SHAPE | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    return _seeded(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def qwen3_moe(**config) -> PreTrainedModel:
    shape = {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}
    return _seeded(Qwen3MoeForCausalLM, Qwen3MoeConfig(**SHAPE | shape | config))


def falcon_h1(lm_head_multiplier: float = 1.0, **config) -> PreTrainedModel:
    """Attention beside a running state."""
    mamba = {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    }  # fmt: skip
    shape = SHAPE | mamba | {"head_dim": 8, "lm_head_multiplier": lm_head_multiplier} | config
    return _seeded(FalconH1ForCausalLM, FalconH1Config(**shape))


def jamba() -> PreTrainedModel:
    """Experts, attention and a running state."""
    layers = {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4,
        "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 4,
    }  # fmt: skip
    return _seeded(JambaForCausalLM, JambaConfig(**SHAPE | layers))


def granite(logits_scaling: float) -> PreTrainedModel:
    return _seeded(GraniteForCausalLM, GraniteConfig(**SHAPE, logits_scaling=logits_scaling))


def cohere(logit_scale: float = 0.0625) -> PreTrainedModel:
    return _seeded(CohereForCausalLM, CohereConfig(**SHAPE, logit_scale=logit_scale))


def cohere2() -> PreTrainedModel:
    return _seeded(Cohere2ForCausalLM, Cohere2Config(**SHAPE))


def llama4() -> PreTrainedModel:
    return _seeded(Llama4ForCausalLM, Llama4TextConfig(**_LLAMA4))


def llama4_image_text() -> PreTrainedModel:
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    }  # fmt: skip
    return _seeded(Llama4ForConditionalGeneration, Llama4Config(text_config=_LLAMA4, vision_config=vision))


# Logits are the LM head's on the final hidden states, soft-capped where the configuration says so.
PLAIN = {
    "llama": llama,
    "gpt2": gpt2,
    "bloom": bloom,
    "opt": opt,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "qwen-vl": qwen_vl,
    "qwen3-moe": qwen3_moe,
    "falcon-h1": falcon_h1,
    "granite": lambda: granite(1.0),
    "cohere": lambda: cohere(1.0),
}
# Logits are a multiple of that.
MULTIPLIED = {
    "falcon-h1": lambda: falcon_h1(0.039),
    "granite": lambda: granite(8.0),
    "cohere": cohere,
    "cohere2": cohere2,
}
