"""Prompts that the model writes itself: where its turn begins, what counts as a prompt, and when to give up."""

import shutil

import pytest
from tiny_model import SYSTEM

from lmtp_factory.distill import chat
from lmtp_factory.distill.engine import Generation, stop_at
from lmtp_factory.distill.filters import Filters
from lmtp_factory.distill.pipeline import Settings, distill
from lmtp_factory.distill.rows import parse_ids
from lmtp_factory.errors import LMTPError


ANSWER = "That is a good question, and here is what I think of it."


def script(number):
    """What the scripted model writes as a user: good prompts, and everything that is not one."""
    return {
        0: "no end " * 30,
        1: "Hi<|im_end|>",
        2: "well<|im_start|>system me too<|im_end|>",
        3: "la " * 30 + "<|im_end|>",
        4: "Tell me about heads and leaps number 9 please<|im_end|>",
        5: "tell me about heads, and leaps: number 9 please!<|im_end|>",
    }.get(number % 20, f"What{number} is{number} the{number} answer{number}?<|im_end|>")


class ScriptedEngine:
    """Writes the script after a bare user turn and a fixed answer after a question."""

    def __init__(self, tokenizer, script):
        self.tokenizer, self.script = tokenizer, script
        self.asked = []

    def generate(self, requests, sampling, *, done, on_tokens, on_rows):
        for request in requests:
            if request.id in done:
                continue
            self.asked.append(request)
            as_user = self.tokenizer.decode(request.prompt_ids).endswith("user\n")
            text = self.script(request.id) if as_user else f"{ANSWER}<|im_end|>"
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][: sampling.max_new_tokens]
            output_ids, finish_reason = stop_at(ids, sampling.stop_ids[:1])
            on_tokens(len(output_ids))
            on_rows([Generation(request.id, output_ids, finish_reason)])


@pytest.fixture
def model(tiny, tmp_path):
    # the scripted words must not run into the tiny model's many end tokens
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    return str(tmp_path / "model")


def settings(model, tmp_path, **options):
    return Settings(
        model=model,
        name="own",
        output_dir=tmp_path / "out",
        prompts=None,
        max_prompt_tokens=120,
        filters=Filters(min_tokens=1),
        **options,
    )


def test_prompts_are_asked_for_until_there_are_enough(model, tmp_path, tokenizer):
    engine, said = ScriptedEngine(tokenizer, script), []
    paths = distill(settings(model, tmp_path, num_prompts=30), tokenizer, lambda: engine, said.append)
    import json

    rows = [json.loads(line) for line in paths[0].read_text().splitlines()]
    assert len(rows) == 30
    assert rows[0]["instruction"] == "Tell me about heads and leaps number 9 please"
    assert all(row["output"] == ANSWER for row in rows)
    for row in rows:
        text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{row['instruction']}<|im_end|>\n"
        assert tokenizer.decode(parse_ids(row["prompt_ids"])) == text + "<|im_start|>assistant\n"
    for reason in ("near-duplicate", "not ended", "repetition loop", "special tokens", "too short"):
        assert reason in said[0]

    # a second run finds prompts and answers in the work files and asks for nothing
    asked = len(engine.asked)
    assert distill(settings(model, tmp_path, num_prompts=30), tokenizer, lambda: engine, said.append) == paths
    assert len(engine.asked) == asked


def test_a_model_that_repeats_itself_is_given_up(model, tmp_path, tokenizer):
    engine = ScriptedEngine(tokenizer, lambda number: "Tell me about heads and leaps<|im_end|>")
    with pytest.raises(LMTPError, match="only 1 are usable"):
        distill(settings(model, tmp_path, num_prompts=10), tokenizer, lambda: engine)


def test_heldout_makes_two_datasets(model, tmp_path, tokenizer):
    engine = ScriptedEngine(tokenizer, script)
    paths = distill(settings(model, tmp_path, num_prompts=20, heldout=0.25), tokenizer, lambda: engine)
    assert [path.name for path in paths] == ["own_train.jsonl", "own_heldout.jsonl"]
    assert [len(path.read_text().splitlines()) for path in paths] == [15, 5]


@pytest.mark.parametrize("system", [None, "Rhyme."])
def test_the_bare_user_turn(tokenizer, system):
    turn = chat.bare_user_turn(tokenizer, system)
    before = tokenizer.decode(turn.before_ids)
    assert before == f"<|im_start|>system\n{system or SYSTEM}<|im_end|>\n<|im_start|>user\n"
    assert turn.end_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_template_without_turn_markers_is_refused(tokenizer):
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: "
    with pytest.raises(LMTPError, match="--prompts FILE"):
        chat.bare_user_turn(plain)


def test_a_template_that_refuses_a_system_text(tokenizer):
    import copy

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}x"
    with pytest.raises(LMTPError, match=r"no system role.*--system"):
        chat.bare_user_turn(strict, "Rhyme.")


def test_no_room_for_a_prompt(model, tmp_path, tokenizer):
    small = settings(model, tmp_path, num_prompts=3)
    small.max_prompt_tokens = 30
    with pytest.raises(LMTPError, match="no room"):
        distill(small, tokenizer, lambda: ScriptedEngine(tokenizer, script))


@pytest.mark.slow
def test_a_real_model(smollm2, tmp_path, distil):
    options = ["--num-prompts", 4, "--prompt-temperature", 0.8, "--max-prompt-tokens", 100, "--max-new-tokens", 16]
    rows = distil(smollm2, "--name", "own", "--output-dir", tmp_path, "--keep-truncated", *options)["own"]
    assert len(rows) == 4
    assert sum(row["instruction"].isascii() for row in rows) >= 3  # sentences, not noise
