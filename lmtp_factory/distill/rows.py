"""The row format of self-distilled data: text for people, token ids for training.

A row is one JSON object a line::

    {"id": 0, "instruction": "...", "output": "...",
     "prompt_ids": "1 9690 198", "output_ids": "19556 17 2", "finish_reason": "stop"}

`prompt_ids` are the tokens that the model read (system text and turn markers included), `output_ids` those that it
wrote, end-of-turn included when `finish_reason` is `stop`. They are kept because decoding and encoding again does not
always give the same tokens; they are decimal strings because LLaMA-Factory's alpaca converter passes only strings.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from llamafactory.data.parser import DatasetAttr

TEMPLATE_NAME = "lmtp"
"""The LLaMA-Factory template that turns such rows back into token ids."""

PROMPT_COLUMN, RESPONSE_COLUMN = "prompt_ids", "output_ids"


def format_ids(ids: Iterable[int]) -> str:
    """Token ids as they stand in a row: decimal numbers with one space between."""
    return " ".join(str(int(token)) for token in ids)


def parse_ids(text: str) -> list[int]:
    """Token ids out of a row's string; the inverse of `format_ids`.

    Raises:
        ValueError: `text` holds anything but decimal numbers and blanks.
    """
    words = text.split()
    for word in words:
        if not (word.isascii() and word.isdecimal()):
            raise ValueError(f"not a token id: {word[:40]!r}")
    return [int(word) for word in words]


def dataset_entry(file_name: str) -> dict[str, Any]:
    """The entry in dataset_info.json that shows a file of such rows to LLaMA-Factory."""
    return {
        "file_name": file_name,
        "formatting": "alpaca",
        "columns": {"prompt": PROMPT_COLUMN, "response": RESPONSE_COLUMN},
    }


def is_self_distilled(dataset_attr: DatasetAttr) -> bool:
    """Whether LLaMA-Factory's description of a dataset says that its columns are token ids."""
    return dataset_attr.prompt == PROMPT_COLUMN and dataset_attr.response == RESPONSE_COLUMN
