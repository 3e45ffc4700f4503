"""Tiny random models of many architectures, in memory or as the directories that ``from_pretrained`` loads.

``<architecture>(**config)`` builds a model of two layers and width 32 for inference; keyword arguments override its
configuration. ``save_<architecture>(directory, **config)`` writes it with its tokenizer, as LLaMA-Factory wants it, and
returns the path. Seeds are fixed, so two calls give equal weights.
"""

import functools
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
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
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
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
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from helpers import tiny_data
from lmtp_factory.modeling import heads_of


SEED = 0
WIDTH = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip

_VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@functools.cache
def _token_ids() -> dict[str, int]:
    """What a configuration takes from the tokenizer."""
    tokenizer = tiny_data.build_tokenizer()
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def shape() -> dict:
    """What most architectures share."""
    return _token_ids() | WIDTH | {"max_position_embeddings": 512}


def _seeded(model_class: type[PreTrainedModel], config) -> PreTrainedModel:
    torch.manual_seed(SEED)
    return model_class(config).eval()


def llama(tie: bool = False, **config) -> PreTrainedModel:
    """Llama: untied like 3.1-8B, or with ``tie`` like 3.2-3B."""
    return _seeded(LlamaForCausalLM, LlamaConfig(**shape() | {"tie_word_embeddings": tie} | config))


def mistral(tie: bool = False, **config) -> PreTrainedModel:
    """A sliding window shorter than the training sequences."""
    own = {"tie_word_embeddings": tie, "sliding_window": 16}
    return _seeded(MistralForCausalLM, MistralConfig(**shape() | own | config))


def qwen2(tie: bool = False, **config) -> PreTrainedModel:
    """Qwen2 and Qwen2.5: untied like 7B, or with ``tie`` like 3B."""
    return _seeded(Qwen2ForCausalLM, Qwen2Config(**shape() | {"tie_word_embeddings": tie} | config))


def qwen3(tie: bool = True, **config) -> PreTrainedModel:
    return _seeded(Qwen3ForCausalLM, Qwen3Config(**shape() | {"tie_word_embeddings": tie, "head_dim": 8} | config))


def mixtral(**config) -> PreTrainedModel:
    """Four experts, two of them a token."""
    own = {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    return _seeded(MixtralForCausalLM, MixtralConfig(**shape() | own | config))


def qwen3_moe(**config) -> PreTrainedModel:
    """Four experts, two of them a token."""
    own = {
        "head_dim": 8, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return _seeded(Qwen3MoeForCausalLM, Qwen3MoeConfig(**shape() | own | config))


def gemma2() -> PreTrainedModel:
    return _seeded(Gemma2ForCausalLM, Gemma2Config(**shape(), head_dim=8))


_GEMMA3_TEXT = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "tie_word_embeddings": True,
                "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip


def gemma3_text(**config) -> PreTrainedModel:
    """Gemma 3's language model alone, the class of the 1B; tied, as all Gemmas."""
    return _seeded(Gemma3ForCausalLM, Gemma3TextConfig(**shape() | _GEMMA3_TEXT | config))


def gemma3(**text_config) -> PreTrainedModel:
    """Gemma 3 with its vision tower, the class of 4B and 12B; ``text_config`` overrides the text part."""
    tokenizer = tiny_data.build_tokenizer()
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**shape() | _GEMMA3_TEXT | text_config),
        vision_config=_VISION,
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids(tokenizer.boi_token),
        eoi_token_index=tokenizer.convert_tokens_to_ids(tokenizer.eoi_token),
        image_token_index=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
        **{name: value for name, value in _token_ids().items() if name != "vocab_size"},
    )
    return _seeded(Gemma3ForConditionalGeneration, config)


def gpt2(**config) -> PreTrainedModel:
    own = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    return _seeded(GPT2LMHeadModel, GPT2Config(**_token_ids() | own | config))


def bloom() -> PreTrainedModel:
    return _seeded(BloomForCausalLM, BloomConfig(**_token_ids(), hidden_size=32, n_layer=2, n_head=4))


def opt() -> PreTrainedModel:
    """Like OPT-350M: hidden states of 32, embeddings and LM head of 16."""
    own = {"ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 64}
    return _seeded(OPTForCausalLM, OPTConfig(**_without(shape(), "intermediate_size", "num_key_value_heads") | own))


def bert() -> PreTrainedModel:
    """A layer stands between its hidden states and the LM head."""
    return _seeded(BertLMHeadModel, BertConfig(**_without(shape(), "num_key_value_heads"), is_decoder=True))


def qwen_vl(tie: bool = False) -> PreTrainedModel:
    """Positions with several axes."""
    text = shape() | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    return _seeded(
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie),
    )


def falcon_h1(lm_head_multiplier: float = 1.0, **config) -> PreTrainedModel:
    """Attention beside a recurrent state."""
    own = {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1,
        "mamba_chunk_size": 16, "head_dim": 8, "lm_head_multiplier": lm_head_multiplier,
    }  # fmt: skip
    return _seeded(FalconH1ForCausalLM, FalconH1Config(**shape() | own | config))


def jamba() -> PreTrainedModel:
    """Experts, attention and a recurrent state."""
    own = {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4,
        "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 4,
    }  # fmt: skip
    return _seeded(JambaForCausalLM, JambaConfig(**shape() | own))


def granite(logits_scaling: float) -> PreTrainedModel:
    return _seeded(GraniteForCausalLM, GraniteConfig(**shape(), logits_scaling=logits_scaling))


def cohere(logit_scale: float = 0.0625) -> PreTrainedModel:
    return _seeded(CohereForCausalLM, CohereConfig(**shape(), logit_scale=logit_scale))


def cohere2() -> PreTrainedModel:
    return _seeded(Cohere2ForCausalLM, Cohere2Config(**shape()))


_LLAMA4 = {"head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2}


def llama4() -> PreTrainedModel:
    return _seeded(Llama4ForCausalLM, Llama4TextConfig(**shape() | _LLAMA4))


def llama4_image_text() -> PreTrainedModel:
    vision = _VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    return _seeded(Llama4ForConditionalGeneration, Llama4Config(text_config=shape() | _LLAMA4, vision_config=vision))


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


def load(path: str | Path) -> PreTrainedModel:
    """The model of a directory, of the class that its configuration names."""
    conditional = "Conditional" in AutoConfig.from_pretrained(path).architectures[0]
    return (AutoModelForImageTextToText if conditional else AutoModelForCausalLM).from_pretrained(path)


def save(model: PreTrainedModel, directory: str | Path) -> Path:
    """Weights, configuration and tokenizer; Gemma 3 with its processor instead."""
    model.save_pretrained(directory)
    tokenizer = tiny_data.build_tokenizer()
    if isinstance(model, Gemma3ForConditionalGeneration):
        from transformers import Gemma3ImageProcessor, Gemma3Processor

        images = Gemma3ImageProcessor(size={"height": 28, "width": 28})
        Gemma3Processor(images, tokenizer, chat_template=tiny_data.CHAT_TEMPLATE, image_seq_length=4).save_pretrained(
            directory
        )
    else:
        tokenizer.save_pretrained(directory)
    return Path(directory)


def _saved(build):
    def write(directory: str | Path, **config) -> Path:
        return save(build(**config), directory)

    write.__name__ = build.__name__  # the id of a parameter
    return write


save_llama, save_mistral, save_qwen2, save_qwen3 = map(_saved, (llama, mistral, qwen2, qwen3))
save_mixtral, save_qwen3_moe = map(_saved, (mixtral, qwen3_moe))
save_gemma3_text, save_gemma3, save_gpt2 = map(_saved, (gemma3_text, gemma3, gpt2))


def _without(values: dict, *names: str) -> dict:
    return {name: value for name, value in values.items() if name not in names}


def randomise_heads(model) -> None:
    """Untrained blocks are the identity; give them weights so that a wrong wiring shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in heads_of(model).parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
