"""Whether a model keeps the documents of a packed row apart is found out by trying."""

import pytest
import torch
from helpers import tiny_models

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.modeling.model import LeapModel
from lmtp_factory.modeling.packing_probe import keeps_documents_apart


MODELS = [
    tiny_models.save_llama,
    tiny_models.save_mistral,
    tiny_models.save_qwen2,
    tiny_models.save_qwen3,
    tiny_models.save_gemma3_text,
    tiny_models.save_gemma3,
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_documents_are_kept_apart(make, attention, tmp_path):
    model = load_plain(make(tmp_path), attention)
    attach_heads(model, LMTPConfig(num_heads=1), stage=1)
    assert keeps_documents_apart(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [{}, {"num_hidden_layers": 8, "hidden_size": 256, "num_experts": 32, "num_experts_per_tok": 4}]
)
def test_experts_of_other_tokens_are_no_leak(shape, dtype):
    assert keeps_documents_apart(with_heads(tiny_models.qwen3_moe(**shape).to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_models.falcon_h1, tiny_models.jamba])
def test_a_running_state_is_found_out(make, dtype):
    assert not keeps_documents_apart(with_heads(make().to(dtype)))


@pytest.mark.parametrize("words", [2, 3, 7, 80, 81, 159])
def test_a_small_vocabulary_is_enough(words):
    assert keeps_documents_apart(with_heads(tiny_models.llama(vocab_size=words)))
    assert not keeps_documents_apart(with_heads(tiny_models.falcon_h1(vocab_size=words)))


def test_the_worst_token_counts(monkeypatch):
    model = with_heads(tiny_models.llama())
    final_hidden_states = LeapModel.final_hidden_states

    def leaking(self, **inputs):
        states = final_hidden_states(self, **inputs)
        states[1, -1] += 1e-5 * states[1, 0]  # into one token, by as little as a long-lived state has left by then
        return states

    monkeypatch.setattr(LeapModel, "final_hidden_states", leaking)
    assert not keeps_documents_apart(model)


def test_the_model_is_left_as_it_was():
    model = with_heads(tiny_models.qwen_vl())
    model.train()
    before = [(sorted(vars(module)), module.training) for module in model.modules()]
    keeps_documents_apart(model)
    assert [(sorted(vars(module)), module.training) for module in model.modules()] == before


def test_positions_with_several_axes_are_found_out():
    assert not keeps_documents_apart(with_heads(tiny_models.qwen_vl()))


def with_heads(model):
    return attach_heads(model, LMTPConfig(num_heads=1), stage=1)


def load_plain(path, attention):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    loader = (
        AutoModelForImageTextToText if "Conditional" in (path / "config.json").read_text() else AutoModelForCausalLM
    )
    return loader.from_pretrained(path, attn_implementation=attention)
