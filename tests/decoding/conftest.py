"""Tiny models with leap heads, made once a session."""

import functools

import pytest
import torch
from helpers import tiny_data, tiny_models
from helpers.decoding import enlarge_weights
from helpers.tiny_models import randomise_heads
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from lmtp_factory import LMTPConfig, attach_heads


ARCHITECTURES = {
    "llama": tiny_models.save_llama,
    "llama-tied": functools.partial(tiny_models.save_llama, tie=True),
    "qwen2": tiny_models.save_qwen2,
    "qwen3": tiny_models.save_qwen3,
    "mistral": tiny_models.save_mistral,
    "gemma3-text": tiny_models.save_gemma3_text,
    "gemma3-softcap": functools.partial(tiny_models.save_gemma3_text, final_logit_softcapping=2.0),
    "gemma3": tiny_models.save_gemma3,
    "gpt2": functools.partial(tiny_models.save_gpt2, n_positions=48),
}


@pytest.fixture(scope="session")
def leap(tmp_path_factory):
    """``leap(architecture, attention, config of the heads)``: the model with heads, for inference, without EOS."""
    folders, models = {}, {}

    def build(architecture: str = "llama", attention: str = "sdpa", heads: dict | None = None, **config):
        written = architecture, repr(config)
        if written not in folders:
            folders[written] = tmp_path_factory.mktemp("models") / architecture
            torch.manual_seed(0)
            ARCHITECTURES[architecture](folders[written], **config)
        key = *written, attention, repr(heads)
        if key not in models:
            models[key] = load(folders[written], attention, heads)
        return models[key]

    return build


def load(folder, attention="sdpa", heads=None):
    conditional = "Conditional" in AutoConfig.from_pretrained(folder).architectures[0]
    auto = AutoModelForImageTextToText if conditional else AutoModelForCausalLM
    model = auto.from_pretrained(folder, attn_implementation=attention).eval()
    enlarge_weights(model)
    config = LMTPConfig(**heads or {})
    # Some tokens all over the vocabulary.
    vocabulary = range(3, 3 + 5 * (config.draft_vocab_size or 0), 5)
    attach_heads(model, config, draft_tokens=list(vocabulary) or None)
    randomise_heads(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_data.build_tokenizer()
