"""What the commands of this folder refuse before a model loads."""

import json

import pytest
from helpers import tiny_models
from transformers import AutoModelForCausalLM

from lmtp_factory import LMTPConfig, attach_heads
from lmtp_factory.cli import main


COUNTS = {
    "tree": ["--limit", "--max-new-tokens", "--context"],
    "bench": ["--limit", "--max-new-tokens", "--nodes", "--repeats"],
    "report": ["--limit", "--batch-size"],
}
OTHERS = {"tree": ["--prompts", "none.jsonl"], "bench": ["--prompts", "none.jsonl"], "report": ["--rows", "none.jsonl"]}


@pytest.mark.parametrize(("command", "option"), [(command, option) for command in COUNTS for option in COUNTS[command]])
@pytest.mark.parametrize("value", ["0", "-3", "1.5", "many"])
def test_counts_are_whole_numbers_above_zero(command, option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "no_model", *OTHERS[command], f"{option}={value}"])
    assert stop.value.code == 2
    assert f"argument {option}: {value} is no whole number of 1 or more" in capsys.readouterr().err


def test_answers_without_a_draft_to_measure_are_refused(tmp_path, capsys):
    path = tiny_models.save_qwen3(tmp_path / "model")
    model = attach_heads(AutoModelForCausalLM.from_pretrained(path), LMTPConfig(num_heads=1))
    model.save_pretrained(path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"instruction": "what?"}))
    assert main(["tree", str(path), "--prompts", str(prompts), "--max-new-tokens", "1", "--context", "16"]) == 1
    assert "no draft can be measured" in capsys.readouterr().err
    assert not (path / "lmtp" / "tree.json").exists()
