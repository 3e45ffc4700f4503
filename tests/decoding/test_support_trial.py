"""The trial that a model's tree-masked forward matches its sequential forwards."""

import copy

import torch
from helpers.decoding import GREEDY, assert_as_stock, assert_left_to_stock, enlarge_weights, padded, prompt
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lmtp_factory import attach_heads
from lmtp_factory.decoding.stats import DecodeStats
from lmtp_factory.decoding.support import trial_failure


MISMATCH = "a tree-masked forward does not match sequential forwards"


def test_a_model_whose_forward_takes_no_tree_falls_back(caplog):
    """It has no cache and builds its own mask, and fails at a given one."""
    torch.manual_seed(0)
    config = OpenAIGPTConfig(
        vocab_size=400, pad_token_id=0, bos_token_id=1, eos_token_id=2, n_embd=32, n_layer=2, n_head=4
    )
    model = OpenAIGPTLMHeadModel(config).eval()
    enlarge_weights(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    attach_heads(model)
    reason = trial_failure(model)
    assert reason.startswith("the trial of a tree-masked forward failed (RuntimeError: ")
    assert_left_to_stock(model, reason, caplog, prompt(), max_new_tokens=8, **GREEDY)
    caplog.clear()
    assert_left_to_stock(model, reason, caplog, **padded([9, 4]), max_new_tokens=8, **GREEDY)


def test_a_trial_under_dropout_is_not_remembered_in_eval_mode(leap):
    model = copy.deepcopy(leap("llama", attention_dropout=0.9))
    model.__dict__.pop("_takes_trees", None)
    model.train()
    stats = DecodeStats()
    model.generate(prompt(), max_new_tokens=4, lmtp_stats=stats, **GREEDY)
    assert stats.stock_reason == MISMATCH
    model.eval()
    assert_as_stock(model, prompt(), max_new_tokens=8, **GREEDY)


def test_dropout_is_left_to_stock_with_its_random_numbers(leap):
    """Whatever was found out in eval mode; trying takes no random numbers from those who sample."""
    model, seen = copy.deepcopy(leap("llama", attention_dropout=0.9)), []
    assert_as_stock(model, prompt(), max_new_tokens=4, **GREEDY)
    model.train()
    for decode in ("off", "auto"):
        torch.manual_seed(0)
        stats = DecodeStats()
        output = model.generate(prompt(), max_new_tokens=12, do_sample=True, lmtp_decode=decode, lmtp_stats=stats)
        seen.append((output.tolist(), float(torch.rand(()))))
    assert seen[0] == seen[1]
    assert stats.stock_reason == MISMATCH


def test_an_error_during_the_trial_is_not_remembered(leap):
    """A device may have been out of memory."""
    model, stats = copy.deepcopy(leap()), DecodeStats()
    model.__dict__.pop("_takes_trees", None)

    def fail(module, args, kwargs):
        if kwargs["input_ids"].shape[1] < 9:
            raise torch.OutOfMemoryError("try again later.\nSecond line")

    hook = model.base_model.register_forward_pre_hook(fail, with_kwargs=True)
    model.generate(prompt(), max_new_tokens=1, lmtp_stats=stats, **GREEDY)
    assert stats.stock_reason == ("the trial of a tree-masked forward failed (OutOfMemoryError: try again later)")
    hook.remove()
    assert_as_stock(model, prompt(), max_new_tokens=8, **GREEDY)


def test_every_attention_implementation_gets_a_trial_of_its_own(leap, monkeypatch):
    """One that ignores its mask says nothing about others, nor others about it."""
    model, stats = copy.deepcopy(leap()), DecodeStats()
    model.__dict__.pop("_takes_trees", None)
    right = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def careless(module, query, key, value, mask, **kwargs):
        return right(module, query, key, value, None if mask is None or mask.dtype == torch.bool else mask, **kwargs)

    for first in ("eager", "sdpa"):
        model.__dict__.pop("_takes_trees", None)
        for attention in (first, "eager" if first == "sdpa" else "sdpa"):
            model.set_attn_implementation(attention)
            monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", careless)
            model.generate(prompt(), max_new_tokens=8, lmtp_stats=stats, **GREEDY)
            monkeypatch.undo()
            assert stats.strategy == ("off" if attention == "sdpa" else "backward")
            assert stats.stock_reason == (MISMATCH if attention == "sdpa" else None)
