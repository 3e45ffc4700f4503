"""What the tokenizer knows about turns: the tokens of a prompt, the start of a user turn, the tokens that end one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import LMTPError, first_line


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .prompts import Prompt

_SENTINEL = "USERTEXTGOESHERE"


@dataclass(frozen=True)
class UserTurn:
    """A user turn with its text taken out: what stands before it, and the special token that ends it."""

    before_ids: tuple[int, ...]
    end_id: int


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory or hub id.

    Raises:
        LMTPError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise LMTPError(
            f"no tokenizer can be loaded from `{model}` ({first_line(error)}): give a Hugging Face model directory "
            "or hub id."
        ) from error


def stop_token_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens at which the model ends its turn, the tokenizer's end-of-sequence token first.

    Instruct models often have several, and only generation_config.json lists them all.
    """
    from transformers import GenerationConfig

    try:
        listed = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        listed = None
    listed = [listed] if isinstance(listed, int) else listed or []
    ids = dict.fromkeys([tokenizer.eos_token_id, *listed])
    return tuple(token for token in ids if token is not None)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, system: str | None = None) -> tuple[int, ...]:
    """The tokens that the model reads before it answers `prompt`.

    With a chat template: the template's, generation prompt included. Without one (base models): the plain text with
    the special tokens that the tokenizer puts in front.

    Args:
        tokenizer: the model's.
        prompt: the conversation so far.
        system: system text, unless the prompt brings its own.

    Raises:
        LMTPError: the chat template refuses the conversation, or nothing is left to continue.
    """
    messages = list(prompt.messages)
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if tokenizer.chat_template:
        return tuple(_render(tokenizer, messages, tokenize=True))
    ids = tokenizer("\n".join(message["content"] for message in messages))["input_ids"]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
        ids = ids[:-1]
    return tuple(ids)


def bare_user_turn(tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> UserTurn:
    """The start of a user turn, after which an instruct model writes a user's text by itself.

    The idea is Magpie's (arXiv 2406.08464). It is found by rendering a marker as the user's text.

    Raises:
        LMTPError: no chat template, or one whose user turn does not end in a special token.
    """
    if not tokenizer.chat_template:
        raise LMTPError(
            "a model without a chat template cannot write its own prompts: give some with `--prompts FILE` or "
            "`--dataset NAME`."
        )
    messages = [{"role": "user", "content": _SENTINEL}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    before, _, after = _render(tokenizer, messages, tokenize=False).partition(_SENTINEL)
    before_ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    special = special_ids(tokenizer)
    ends = [token for token in tokenizer(after, add_special_tokens=False)["input_ids"] if token in special]
    if not before_ids or not ends:
        raise LMTPError(
            "this model's chat template does not mark user turns with special tokens, so it cannot write its own "
            "prompts: give some with `--prompts FILE` or `--dataset NAME`."
        )
    return UserTurn(tuple(before_ids), ends[0])


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that no text is made of: those the tokenizer calls special, and all that were added to its vocabulary
    (many tokenizers list a turn marker only there)."""
    return set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, tokenize: bool):
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=tokenize, **({"return_dict": False} if tokenize else {})
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise LMTPError(
            f"the model's chat template refuses a conversation of roles {roles} ({first_line(error)}): change the "
            "prompts, or leave out `--system`."
        ) from error
