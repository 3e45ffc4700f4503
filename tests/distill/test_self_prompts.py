"""Prompts that the model writes: what counts as one, and when a run gives up."""

import random
import re
import shutil

import pytest
from helpers.distillation import SYSTEM, read_rows
from helpers.distillation import distill as run_command
from helpers.scripted_engine import ANSWER, ScriptedEngine

from lmtp_factory.distill.pipeline import Settings, distill
from lmtp_factory.distill.rows import parse_ids
from lmtp_factory.errors import LMTPError


def write_prompt(number):
    """Usable prompts, and one sample for each reason to drop it."""
    return {
        0: "no end " * 30,
        1: "Hi<|im_end|>",
        2: "well<|im_start|>system me too<|im_end|>",
        3: "la " * 30 + "<|im_end|>",
        4: "Tell me about heads and leaps number 9 please<|im_end|>",
        5: "tell me about heads, and leaps: number 9 please!<|im_end|>",
    }.get(number % 20, f"What{number} is{number} the{number} answer{number}?<|im_end|>")


@pytest.fixture
def scripted(distill_model, tmp_path, tokenizer):
    """Distill self-written prompts with a given engine; returns the rows."""
    # the words of the script would contain some of the tiny model's many end tokens
    model = tmp_path / "model"
    shutil.copytree(distill_model, model)
    (model / "generation_config.json").unlink()

    def run(engine, num_prompts, max_prompt_tokens=120):
        settings = Settings(
            model=str(model),
            name="own",
            output_dir=tmp_path / "out",
            num_prompts=num_prompts,
            max_prompt_tokens=max_prompt_tokens,
        )
        (path,) = distill(settings, tokenizer, lambda: engine)
        return read_rows(path)

    return run


def test_samples_are_drawn_until_there_are_enough(scripted, tokenizer, capsys):
    engine = ScriptedEngine(tokenizer, write_prompt)
    rows = scripted(engine, 30)
    assert len(rows) == 30
    assert rows[0]["instruction"] == "Tell me about heads and leaps number 9 please"
    assert all(row["output"] == ANSWER for row in rows)
    for row in rows:
        text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{row['instruction']}<|im_end|>\n"
        assert tokenizer.decode(parse_ids(row["prompt_ids"])) == text + "<|im_start|>assistant\n"
    report = capsys.readouterr().out
    for reason in ("near-duplicate", "not ended", "repetition loop", "special tokens", "too short"):
        assert reason in report

    # a second run finds prompts and answers in the journals
    asked = len(engine.asked)
    assert scripted(engine, 30) == rows
    assert len(engine.asked) == asked


def test_a_model_that_repeats_itself_is_refused(scripted, tokenizer):
    engine = ScriptedEngine(tokenizer, lambda number: "Tell me about heads and leaps<|im_end|>")
    with pytest.raises(LMTPError, match="only 1 are usable"):
        scripted(engine, 10)


class LongestPrompts(ScriptedEngine):
    """Writes prompts as long as it may."""

    def generate(self, requests, sampling, **options):
        def write(number):
            letters, text = random.Random(number), f"What{number} is{number} the{number} answer{number}"
            while len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) < sampling.max_new_tokens - 1:
                text += letters.choice("bcdfghjklmpqrstvwxz ")
            return f"{text}<|im_end|>"

        self.write_prompt = write
        super().generate(requests, sampling, **options)


def test_the_longest_prompts_fit(scripted, tokenizer, capsys):
    rows = scripted(LongestPrompts(tokenizer), 5, max_prompt_tokens=121)
    assert len(rows) == 5
    assert 119 <= max(len(parse_ids(row["prompt_ids"])) for row in rows) <= 121
    assert "too long" not in capsys.readouterr().out


def test_no_room_for_a_prompt(scripted, tokenizer):
    with pytest.raises(LMTPError, match=r"--max-prompt-tokens 30 leaves no room .* write at least \d+\.") as error:
        scripted(ScriptedEngine(tokenizer, write_prompt), 3, max_prompt_tokens=30)
    enough = int(re.search(r"at least (\d+)", str(error.value))[1])
    with pytest.raises(LMTPError, match="leaves no room"):
        scripted(ScriptedEngine(tokenizer, write_prompt), 3, max_prompt_tokens=enough - 1)
    with pytest.raises(LMTPError, match="are usable prompts"):  # there is room, but this model does not end
        scripted(ScriptedEngine(tokenizer, lambda number: "no end " * 30), 3, max_prompt_tokens=enough)


@pytest.mark.slow
def test_a_real_model(smollm2, tmp_path):
    options = ["--num-prompts", 4, "--max-prompt-tokens", 100, "--max-new-tokens", 16, "--keep-truncated"]
    run_command(smollm2, "--name", "own", "--output-dir", tmp_path, *options)
    rows = read_rows(tmp_path / "own.raw.jsonl")
    assert len(rows) == 4
    assert sum(row["instruction"].isascii() for row in rows) >= 3  # sentences, not noise
