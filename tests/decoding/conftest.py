"""Tiny models with leap heads, made once a session."""

import functools

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GPT2Config, GPT2LMHeadModel
from trials import randomise, stir

from lmtp_factory import LMTPConfig, attach_heads


ARCHITECTURES = {
    "llama": tiny.tiny_llama,
    "llama-tied": functools.partial(tiny.tiny_llama, tie=True),
    "qwen2": tiny.tiny_qwen2,
    "qwen3": tiny.tiny_qwen3,
    "mistral": tiny.tiny_mistral,
    "gemma3-text": tiny.tiny_gemma3_text,
    "gemma3-softcap": functools.partial(tiny.tiny_gemma3_text, final_logit_softcapping=2.0),
    "gemma3": tiny.tiny_gemma3,
    "gpt2": lambda directory, **config: GPT2LMHeadModel(
        GPT2Config(**{"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48} | config)
    ).save_pretrained(directory),
}


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Threads that wait for each other cost these tiny models more than they gain, on a busy machine most of all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    stir(model)
    attach_heads(model, LMTPConfig(**heads or {}))
    randomise(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tiny_tokenizer()
