"""Registers the template of self-distilled rows, whose columns hold token ids."""

from dataclasses import dataclass
from types import ModuleType

from llamafactory.data import template as upstream
from llamafactory.data.data_utils import Role
from transformers import PreTrainedTokenizerBase

from ....distill.rows import TEMPLATE_NAME, parse_ids
from ....errors import LMTPError
from ... import hooks


@dataclass
class SelfDistilledTemplate(upstream.Template):
    """Encodes messages of token ids, and leaves the tokenizer as it is.

    The ids include turn markers, system text and end of turn, so the template adds no token. A response that was cut at its
    token limit has no end of turn.
    """

    def _encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: list[dict[str, str]],
        system: str | None,
        tools: str | None,
    ) -> list[list[int]]:
        """Token ids of each message, in order.

        Raises:
            LMTPError: A message holds something other than ids, or ids that the tokenizer lacks; or a system text or tools
                have to be added.
        """
        if system or tools or self.default_system:
            raise LMTPError(
                f"template: {TEMPLATE_NAME} cannot add a system text or tools, because the rows already hold every "
                "token that the model read: drop `default_system` and the system and tools columns."
            )
        return [self._message_ids(tokenizer, message) for message in messages]

    @staticmethod
    def _message_ids(tokenizer: PreTrainedTokenizerBase, message: dict[str, str]) -> list[int]:
        try:
            if message["role"] not in (Role.USER, Role.ASSISTANT):
                raise ValueError(f"a {message['role']} turn")
            ids = parse_ids(message["content"])
        except ValueError as error:
            raise LMTPError(
                f"template: {TEMPLATE_NAME} reads only rows of token ids written by `lmtp-cli distill` ({error}); "
                "write the model's own template for ordinary text, for example template: qwen."
            ) from None
        if ids and max(ids) >= len(tokenizer):
            raise LMTPError(
                f"A self-distilled row holds token id {max(ids)}, but the tokenizer has only {len(tokenizer)} tokens: "
                "train on rows that were distilled from this model."
            )
        return ids

    def fix_special_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set a padding token if the tokenizer has none. The end-of-turn token stays the model's."""
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token

    def fix_jinja_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer's chat template: the rows were made with it, and exports need it."""


def extend(template: ModuleType) -> None:
    """Register `template: lmtp`, unless it is registered already."""
    register = hooks.expect(template, "register_template", "name", "template_class")
    if TEMPLATE_NAME not in template.TEMPLATES:
        register(name=TEMPLATE_NAME, template_class=SelfDistilledTemplate)
