"""Types and ranges of the L-MTP keys' values, whether they come from YAML, the command line or Python."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import LMTPError
from ..geometry import DEFAULT_NUM_HEADS, DEFAULT_STRIDE
from ..options import HEAD_DECAY, HEAD_LAYERS, HEAD_WEIGHT


@dataclass(frozen=True)
class Kind:
    """Values that a key accepts.

    Attributes:
        fits: Whether a value is accepted.
        words: What the value has to be, as a message says it after "it has to be".
        example: An accepted value, as YAML spells it.
        optional: Whether null is accepted too; it leaves the key out.
    """

    fits: Callable[[Any], bool]
    words: str
    example: str
    optional: bool = True


def is_whole(value: Any) -> bool:
    """Whether `value` is a whole number. `True` is not, although Python treats it as 1."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and bool(os.fspath(value).strip())


# `geometry` refuses whole numbers that are too small, with the reason. Unknown words are refused where they are read.
KINDS = {
    "num_heads": Kind(is_whole, "a whole number", str(DEFAULT_NUM_HEADS)),
    "leap_stride": Kind(is_whole, "a whole number", str(DEFAULT_STRIDE)),
    "head_layers": Kind(is_whole, "a whole number", str(HEAD_LAYERS)),
    "head_backs": Kind(is_whole, "a whole number", "3"),
    "draft_vocab_size": Kind(is_whole, "a whole number", "8192"),
    "head_weight": Kind(
        lambda value: _is_finite(value) and value >= 0, "a number of 0 or more", str(HEAD_WEIGHT), False
    ),
    "head_decay": Kind(lambda value: _is_finite(value) and value > 0, "a number above 0", str(HEAD_DECAY), False),
    "head_learning_rate": Kind(lambda value: _is_finite(value) and value > 0, "a number above 0", "1.0e-3"),
    "stage1_pretrained_path": Kind(_is_path, "the path of one directory", "saves/stage1"),
    "hidden_cache_dir": Kind(_is_path, "the path of one directory", "saves/hidden_states"),
    "train_lm_head": Kind(lambda value: isinstance(value, bool), "true or false, without quotes", "true", False),
}


def check_values(written: Mapping[str, Any]) -> None:
    """Check the type and range of every value.

    Args:
        written: Key to value. Keys that `KINDS` lacks are not checked.

    Raises:
        LMTPError: A value is not accepted; the message says what the first such value has to be.
    """
    for key, kind in KINDS.items():
        value = written[key]
        if not (kind.fits(value) or (kind.optional and value is None)):
            raise LMTPError(
                f"{key} is {value!r}, but it has to be {kind.words}: write for instance {key}: {kind.example}."
            )


def read_offsets(written: Any) -> list[int]:
    """Offsets of the extra heads from the value of `leap_offsets`: text like `2,3,6`, a list, or one number.

    Raises:
        LMTPError: A part is not a whole number.
    """
    parts = written.split(",") if isinstance(written, str) else written
    parts = list(parts) if isinstance(parts, (list, tuple)) else [parts]
    try:
        if all(is_whole(part) or isinstance(part, str) for part in parts):
            return [int(part) for part in parts]
    except ValueError:
        pass
    raise LMTPError(
        f"leap_offsets is {written!r}, but it has to be whole numbers: write for instance leap_offsets: 2,3,6."
    )
