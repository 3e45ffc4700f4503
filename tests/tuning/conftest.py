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


HEADS = {
    "stride 2": {"num_heads": 3, "stride": 2},
    "rising": {"offsets": (2, 3, 6)},
    "all layers": {"offsets": (2, 3, 6), "head_inputs": "layers"},
}


@pytest.fixture(scope="session", params=HEADS)
def model(request, tmp_path_factory):
    """Tied embeddings and untrained heads: a model that repeats itself, so drafts are often right."""
    path = tiny_models.save_qwen3(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    attach_heads(model, LMTPConfig(**HEADS[request.param]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for head in model.leap_heads.heads:
            if head.leap_mix is not None:  # from its weight on, the state of the first layer changes the drafts
                head.leap_mix.copy_(0.05 * torch.randn(head.leap_mix.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def observed(model, prompts):
    return [observe(model, row, width=6) for row in self_generated_rows(model, prompts, 40)]
