"""Tiny models to chat with, whose heads know what they are going to say."""

import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from helpers import tiny_data, tiny_models
from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.decoding import mixin


QUESTIONS = ("what does a frog do?", "what does the river do?", "where is the old stone?", "who leaps?")
# What `template: qwen` makes of a question.
PROMPT = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
LENGTH = 4096


def draft_in_every_step(monkeypatch) -> None:
    """Let the default tree draft in every step of this process.

    Otherwise the budget stops drafts by the seconds that steps take. On a loaded machine few steps draft, and tau is near 1.
    The tokens are the same then, because no two logits of these models are nearly equal.
    """
    default_tree = mixin.tree_config_for
    monkeypatch.setattr(mixin, "tree_config_for", lambda *args: replace(default_tree(*args), always=True))


def save_endless(directory: str | Path) -> Path:
    """A heads export whose answers never end by themselves: up to 4,000 tokens, in circles after a while."""
    return _save_answering_model(directory, ends=False)


def save_ending(directory: str | Path) -> Path:
    """One whose answer to the first question ends after some 20 tokens."""
    return _save_answering_model(directory, ends=True)


def save_english_speaking(directory: str | Path) -> Path:
    """One that says in English what the tiny dataset taught it."""
    directory = tiny_models.save_llama(directory, hidden_size=64, intermediate_size=128)
    tokenizer, model = tiny_data.build_tokenizer(), AutoModelForCausalLM.from_pretrained(directory)
    texts = [PROMPT.format(question) + answer + "<|im_end|>" for question, answer in tiny_data.texts(4)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    batch["labels"] = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    _learn(model, model.parameters(), batch, steps=150)
    model.save_pretrained(directory)
    attach_heads(model, LMTPConfig(num_heads=3, stride=2), stage=1)
    _learn(model, model.leap_heads.parameters(), batch, steps=60)
    model.save_pretrained(directory)
    return directory


def _learn(model, parameters, batch, steps: int) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _save_answering_model(directory: str | Path, ends: bool) -> Path:
    directory = tiny_models.save_llama(directory, max_position_embeddings=LENGTH)
    tokenizer = tiny_data.build_tokenizer()
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", tiny_data.EOS, tiny_data.PAD])
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.lm_head.weight[stops] = 0
    answers = {question: _answer(model, tokenizer, question, stops) for question in QUESTIONS}
    if ends:  # the end of an answer is said where the first token that is new after the 20th was said
        said = answers[QUESTIONS[0]].tolist()
        last = next(token for place, token in enumerate(said) if place > 20 and token not in said[:place])
        with torch.no_grad():
            model.lm_head.weight[stops[0]] = 1.01 * model.lm_head.weight[last]
        answers = {question: _answer(model, tokenizer, question, stops) for question in QUESTIONS}
    model.save_pretrained(directory)

    attach_heads(model, LMTPConfig(num_heads=3, stride=2), stage=1)
    optimizer = torch.optim.AdamW(model.leap_heads.parameters(), lr=1e-2)
    for _ in range(30):
        for answer in answers.values():
            model(input_ids=answer[None], labels=answer[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)  # after stage 1: lmtp/ alone
    return directory


def _answer(model, tokenizer, question: str, stops: list[int]) -> torch.Tensor:
    prompt = tokenizer(PROMPT.format(question), return_tensors="pt", add_special_tokens=False).input_ids
    kwargs = {"output_logits": True, "return_dict_in_generate": True}
    output = model.generate(prompt, max_new_tokens=100, do_sample=False, eos_token_id=stops, **kwargs)
    best, second = torch.cat(output.logits).topk(2).values.T
    # Forwards of several tokens round otherwise, by some 1e-7 here. No tie is so near that they choose another token.
    assert (best - second).min() > 2e-5
    return output.sequences[0, prompt.shape[1] :]


def chat_model(model, **args):
    """What chat, api and webchat are made of."""
    from llamafactory.chat import ChatModel

    args = {"model_name_or_path": model, "template": "qwen", "do_sample": False, "max_new_tokens": 60} | args
    return ChatModel({key: str(value) if isinstance(value, os.PathLike) else value for key, value in args.items()})


def eventually(condition, seconds: float = 20):
    """The condition's value once it holds; answers finish in other threads."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


def ask(model, question=QUESTIONS[0], **args) -> dict:
    """A whole answer, with its counts."""
    return asdict(model.chat([{"role": "user", "content": question}], **args)[0])


def stream(model, question=QUESTIONS[0], **args) -> str:
    """An answer that came in pieces."""
    return "".join(model.stream_chat([{"role": "user", "content": question}], **args))
