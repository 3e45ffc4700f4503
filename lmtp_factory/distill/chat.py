"""Token ids of chat templates: the prompt, the start of a user turn, the tokens that end a turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import LMTPError, first_line


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .prompts import Prompt

_MARKER = "USERTEXTGOESHERE"


@dataclass(frozen=True)
class UserTurn:
    """A user turn without its text.

    Attributes:
        before_ids: Tokens before the user's text, including a default system text.
        end_id: Special token that ends the turn.
        after_ids: Tokens behind the user's text: the end of the turn and the generation prompt.
    """

    before_ids: tuple[int, ...]
    end_id: int
    after_ids: tuple[int, ...]


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local directory or hub id.

    Raises:
        LMTPError: The tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise LMTPError(
            f"No tokenizer can be loaded from {model} ({first_line(error)}): name a Hugging Face model directory or "
            "hub id."
        ) from error


def stop_token_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that end the model's turn, the tokenizer's end-of-sequence token first.

    Instruct models often have several, and only generation_config.json lists them all.

    Raises:
        LMTPError: Neither the tokenizer nor generation_config.json defines one.
    """
    from transformers import GenerationConfig

    try:
        listed = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        listed = None
    listed = [listed] if isinstance(listed, int) else listed or []
    ids = tuple(token for token in dict.fromkeys([tokenizer.eos_token_id, *listed]) if token is not None)
    if not ids:
        raise LMTPError(
            f"Neither the tokenizer nor generation_config.json of {model} names an end token: set eos_token in "
            "tokenizer_config.json."
        )
    return ids


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...]:
    """Tokenize `prompt` with the chat template, including the generation prompt.

    Without a chat template (base models) the prompt is plain text with the tokenizer's leading special tokens.

    Raises:
        LMTPError: The chat template rejects the conversation.
    """
    if tokenizer.chat_template:
        return tuple(_render(tokenizer, list(prompt.messages), tokenize=True))
    ids = tokenizer("\n".join(message["content"] for message in prompt.messages))["input_ids"]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers append it to every text
        ids = ids[:-1]
    return tuple(ids)


def bare_user_turn(tokenizer: PreTrainedTokenizerBase) -> UserTurn:
    """Return the start of a user turn, which an instruct model continues with a prompt (Magpie, arXiv 2406.08464).

    The chat template renders a marker as the user's text. The start consists of the tokens before the marker.

    Raises:
        LMTPError: There is no chat template, or its user turn does not end with a special token.
    """
    if not tokenizer.chat_template:
        raise LMTPError(
            "A model without a chat template cannot write its own prompts: give some with --prompts FILE or "
            "--dataset NAME."
        )
    text = _render(tokenizer, [{"role": "user", "content": _MARKER}], tokenize=False)
    before, _, after = text.partition(_MARKER)
    before_ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    special = special_ids(tokenizer)
    after_ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    ends = [token for token in after_ids if token in special]
    if not before_ids or not ends:
        raise LMTPError(
            "This model's chat template does not mark user turns with special tokens, so the model cannot write its "
            "own prompts: give some with --prompts FILE or --dataset NAME."
        )
    return UserTurn(tuple(before_ids), ends[0], tuple(after_ids))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of special and added tokens. Many tokenizers list turn markers only among the added tokens."""
    return set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, tokenize: bool):
    from jinja2 import TemplateError

    form = {"return_dict": False} if tokenize else {}
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=tokenize, **form)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise LMTPError(
            f"The model's chat template refuses a conversation of roles {roles} ({first_line(error)}): change the "
            "prompts."
        ) from error
