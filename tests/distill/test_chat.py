"""Token ids of prompts and user turns."""

import copy

import pytest
from helpers.distillation import SYSTEM

from lmtp_factory.distill import chat
from lmtp_factory.distill.prompts import build_prompt
from lmtp_factory.errors import LMTPError


@pytest.fixture
def with_template(tokenizer):
    """A copy of the tokenizer with another chat template."""

    def build(template):
        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        return other

    return build


@pytest.mark.parametrize("system", [None, "Rhyme."])
def test_a_system_text_replaces_the_default(tokenizer, system):
    text = tokenizer.decode(chat.prompt_ids(tokenizer, build_prompt("Hi", system)))
    turns = f"<|im_start|>system\n{system or SYSTEM}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert text == turns + "<|im_start|>assistant\n"


def test_a_base_model_continues_the_plain_text(tokenizer, with_template):
    ids = chat.prompt_ids(with_template(None), build_prompt("tell me"))
    assert list(ids) == tokenizer("tell me")["input_ids"]


def test_all_end_tokens_are_found(distill_model, tokenizer):
    assert chat.stop_token_ids(str(distill_model), tokenizer) == (2, *range(40, len(tokenizer), 20))


def test_a_model_without_an_end_token(tmp_path, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token = None
    with pytest.raises(LMTPError, match="set eos_token"):
        chat.stop_token_ids(str(tmp_path), other)


def test_the_bare_user_turn(tokenizer):
    turn = chat.bare_user_turn(tokenizer)
    assert tokenizer.decode(turn.before_ids) == f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    assert turn.end_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.decode(turn.after_ids) == "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "template",
    [None, "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: "],
    ids=["no template", "no turn markers"],
)
def test_a_template_without_user_turns_is_refused(with_template, template):
    with pytest.raises(LMTPError, match="--prompts FILE"):
        chat.bare_user_turn(with_template(template))


def test_a_conversation_that_the_template_refuses(with_template):
    strict = with_template("{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}x")
    with pytest.raises(LMTPError, match=r"roles system, user \(no system role\): change the prompts\."):
        chat.prompt_ids(strict, build_prompt("Hi", "Rhyme."))
