"""Heads on every supported architecture: the loss against brute force, freezing, saving and loading."""

import pytest
import torch
from helpers import tiny_models
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from lmtp_factory import LMTPError, attach_heads


def load(path):
    auto = AutoModelForImageTextToText if "gemma3" in str(AutoConfig.from_pretrained(path).architectures) and (
        "Conditional" in str(AutoConfig.from_pretrained(path).architectures)
    ) else AutoModelForCausalLM  # fmt: skip
    return auto.from_pretrained(path)


def batch(rows=2, length=19, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 200, (rows, length), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_fresh_heads_predict_what_the_lm_head_predicts(tmp_path):
    model = attach_heads(load(tiny_models.save_llama(tmp_path)))
    hidden = torch.randn(3, model.config.hidden_size)
    logits = model.leap_heads.logits(hidden, model.get_output_embeddings())
    torch.testing.assert_close(logits, model.lm_head(hidden).expand(3, 3, -1))


def test_a_second_attach_is_refused(tmp_path):
    model = attach_heads(load(tiny_models.save_llama(tmp_path)))
    with pytest.raises(LMTPError, match="leap heads already"):
        attach_heads(model)
