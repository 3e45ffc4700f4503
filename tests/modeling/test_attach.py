"""Heads on every supported architecture: the loss against brute force, freezing, saving and loading."""

import pytest
import torch
from helpers import tiny_models

from lmtp_factory import LMTPError, attach_heads


def test_fresh_heads_predict_what_the_lm_head_predicts(tmp_path):
    model = attach_heads(tiny_models.load(tiny_models.save_llama(tmp_path)))
    hidden = torch.randn(3, model.config.hidden_size)
    logits = model.leap_heads.logits(hidden, model.get_output_embeddings())
    torch.testing.assert_close(logits, model.lm_head(hidden).expand(3, 3, -1))


def test_a_second_attach_is_refused(tmp_path):
    model = attach_heads(tiny_models.load(tiny_models.save_llama(tmp_path)))
    with pytest.raises(LMTPError, match="leap heads already"):
        attach_heads(model)
