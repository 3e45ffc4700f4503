"""LLaMA-Factory's template for self-distilled rows: no text in between, the tokens are those of the row.

Import this module after `llamafactory.data.template`, or let it import that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamafactory.data import template as upstream
from llamafactory.data.data_utils import Role

from ..distill.rows import TEMPLATE_NAME, is_self_distilled, parse_ids
from ..errors import LMTPError


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TEMPLATE_NAME", "SelfDistilledTemplate", "is_self_distilled", "register_self_distilled_template"]


@dataclass
class SelfDistilledTemplate(upstream.Template):
    """Reads token ids where other templates read text, and leaves the tokenizer as it is.

    Turn markers, system text and end-of-turn are already among the ids, so nothing is added. A response that was cut
    at its token limit has no end-of-turn, and none is invented.
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
            LMTPError: a message holds something other than ids, ids the tokenizer does not have, or a system text
                or tools are asked for on top of what the ids contain.
        """
        if system or tools or self.default_system:
            raise LMTPError(
                f"template `{TEMPLATE_NAME}` cannot add a system text or tools, because the rows already hold every "
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
                f"template `{TEMPLATE_NAME}` reads only rows of token ids written by `lmtp-cli distill` ({error}); "
                "for ordinary text use the model's own template, for example `template: qwen`."
            ) from None
        if ids and max(ids) >= len(tokenizer):
            raise LMTPError(
                f"a self-distilled row holds token id {max(ids)}, but the tokenizer has only {len(tokenizer)} tokens: "
                "train on rows that were distilled from this model."
            )
        return ids

    def fix_special_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the tokenizer a padding token if it has none; the end-of-turn token stays what the model uses."""
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token

    def fix_jinja_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer's chat template: the rows were made with it, and exports must carry it on."""


def register_self_distilled_template() -> None:
    """Make `template: lmtp` known to LLaMA-Factory; a second call does nothing."""
    if TEMPLATE_NAME not in upstream.TEMPLATES:
        upstream.register_template(name=TEMPLATE_NAME, template_class=SelfDistilledTemplate)
