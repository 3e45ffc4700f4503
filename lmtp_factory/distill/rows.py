"""The row format of self-distilled data: text for people, token ids for training.

A row is one JSON object a line::

    {"id": 0, "instruction": "...", "output": "...",
     "prompt_ids": "1 9690 198", "output_ids": "19556 17 2", "finish_reason": "stop"}

`prompt_ids` holds the tokens that the model read, system text and turn markers included. `output_ids` holds the tokens
that it wrote, the end of turn included if `finish_reason` is `stop`. Decoding and encoding again does not always give
the same tokens, so the ids are kept. They are decimal strings because LLaMA-Factory's alpaca converter passes only
strings.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol


TEMPLATE_NAME = "lmtp"
"""The LLaMA-Factory template that turns such rows back into token ids."""

PROMPT_COLUMN, RESPONSE_COLUMN = "prompt_ids", "output_ids"


class DatasetColumns(Protocol):
    """The columns that LLaMA-Factory's `DatasetAttr` names as prompt and response."""

    prompt: str | None
    response: str | None


def format_ids(ids: Iterable[int]) -> str:
    """Token ids as a row holds them: decimal numbers with one space between."""
    return " ".join(str(int(token)) for token in ids)


def parse_ids(text: str) -> list[int]:
    """Token ids from a row's string; the inverse of `format_ids`.

    Raises:
        ValueError: `text` holds anything but decimal numbers and blanks.
    """
    words = text.split()
    for word in words:
        if not (word.isascii() and word.isdecimal()):
            raise ValueError(f"not a token id: {word[:40]!r}")
    return [int(word) for word in words]


def dataset_entry(file_name: str) -> dict[str, Any]:
    """The dataset_info.json entry of a file of such rows."""
    return {
        "file_name": file_name,
        "formatting": "alpaca",
        "columns": {"prompt": PROMPT_COLUMN, "response": RESPONSE_COLUMN},
    }


def is_self_distilled(columns: DatasetColumns) -> bool:
    """Whether the columns of a dataset hold token ids."""
    return columns.prompt == PROMPT_COLUMN and columns.response == RESPONSE_COLUMN
