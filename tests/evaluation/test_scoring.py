"""The report's numbers against the model's own, and what it refuses."""

import math

import pytest
import torch
from helpers import tiny_data, tiny_models
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPConfig, LMTPError, attach_heads
from lmtp_factory.cli import main
from lmtp_factory.evaluation.scoring import read_rows, score_heads


@pytest.fixture
def model(tmp_path):
    return AutoModelForCausalLM.from_pretrained(tiny_models.save_llama(tmp_path / "model"))


@pytest.fixture
def rows(tmp_path):
    return tiny_data.save_token_rows(tmp_path / "rows.jsonl")


def test_scores_are_the_model_s_own_over_all_tokens(model, rows):
    losses, hits, targets = 0.0, 0, 0
    for prompt, output in read_rows(rows):
        logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(output), reduction="sum").item()
        hits += (logits.argmax(-1) == torch.tensor(output)).sum().item()
        targets += len(output)
    for batch_size in (1, 2, 3):  # padding must not count
        scored = attach_heads(AutoModelForCausalLM.from_pretrained(model.config.name_or_path), LMTPConfig(num_heads=1))
        scores = score_heads(scored, read_rows(rows), batch_size)
        assert scores.targets == (targets, targets)
        assert scores.losses[0] == pytest.approx(losses / targets, rel=1e-5)
        assert scores.accuracies[0] == pytest.approx(hits / targets)
        assert scores.perplexity == pytest.approx(math.exp(losses / targets), rel=1e-5)


def test_rows_that_are_none_are_refused(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt_ids": "1 2", "output_ids": "3"}\n{"prompt_ids": "1 x"}\n')
    with pytest.raises(LMTPError, match="line 2 is no row"):
        read_rows(path)
    assert main(["report", "no-model", "--rows", str(tmp_path / "absent.jsonl")]) == 1
    assert "is no file: name the JSONL file" in capsys.readouterr().err
