"""A tiny model and what its heads propose along its own text."""

import pytest
import torch
from helpers import tiny_models
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.evaluation.self_generated import self_generated_rows
from lmtp_factory.tuning.replay import observe


@pytest.fixture(scope="session")
def prompts():
    return [[30, 40, 50], [60, 61, 62, 63, 64, 65], [70]]


@pytest.fixture(scope="session", params=[(2, None), (None, (2, 3, 6))], ids=["stride 2", "rising"])
def model(request, tmp_path_factory):
    """Tied embeddings and untrained heads: a model that repeats itself, so drafts are often right."""
    stride, offsets = request.param
    path = tiny_models.save_qwen3(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return attach_heads(model, LMTPConfig(num_heads=None if offsets else 3, stride=stride, offsets=offsets))


@pytest.fixture(scope="session")
def observed(model, prompts):
    return [observe(model, row, width=6) for row in self_generated_rows(model, prompts, 40)]
