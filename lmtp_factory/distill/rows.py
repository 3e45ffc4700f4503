"""Row format of self-distilled data: text for people, token ids for training.

A row is a JSON object on one line:

    {"id": 0, "instruction": "...", "output": "...",
     "prompt_ids": "1 9690 198", "output_ids": "19556 17 2", "finish_reason": "stop"}

`prompt_ids` are the tokens of the prompt, including system text and turn markers. `output_ids` are the generated
tokens, including the end of turn if `finish_reason` is `stop`. Token ids are stored because decoding and encoding does
not always give the same tokens. They are decimal strings because LLaMA-Factory's alpaca converter passes only strings.
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
    """Format token ids as in a row: decimal numbers separated by spaces."""
    return " ".join(str(int(token)) for token in ids)


def parse_ids(text: str) -> list[int]:
    """Parse token ids from a row's string; the inverse of `format_ids`.

    Raises:
        ValueError: `text` contains anything but decimal numbers and white space.
    """
    words = text.split()
    for word in words:
        if not (word.isascii() and word.isdecimal()):
            raise ValueError(f"not a token id: {word[:40]!r}")
    return [int(word) for word in words]


def dataset_entry(file_name: str) -> dict[str, Any]:
    """Return the dataset_info.json entry of a file of such rows."""
    return {
        "file_name": file_name,
        "formatting": "alpaca",
        "columns": {"prompt": PROMPT_COLUMN, "response": RESPONSE_COLUMN},
    }


def is_self_distilled(columns: DatasetColumns) -> bool:
    """Return whether the columns of a dataset contain token ids."""
    return columns.prompt == PROMPT_COLUMN and columns.response == RESPONSE_COLUMN
