"""What the values of the L-MTP keys have to be, whatever YAML, command line or a caller made of them."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import LMTPError


@dataclass(frozen=True)
class Kind:
    """The values that a key takes.

    Attributes:
        fits: whether a value is one of them.
        words: what they are, after "it has to be".
        example: one of them, as it is written in YAML.
        optional: whether null leaves the key out.
    """

    fits: Callable[[Any], bool]
    words: str
    example: str
    optional: bool = True


def is_whole(value: Any) -> bool:
    """Whether ``value`` is a whole number; ``true`` is none, although Python counts it as 1."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and bool(os.fspath(value).strip())


# Whole numbers that are too small are refused by the geometry, which knows why; unknown words by those who read them.
KINDS = {
    "num_heads": Kind(is_whole, "a whole number", "3"),
    "leap_stride": Kind(is_whole, "a whole number", "2"),
    "head_layers": Kind(is_whole, "a whole number", "1"),
    "head_weight": Kind(lambda value: _is_finite(value) and value >= 0, "a number of 0 or more", "0.1", False),
    "head_decay": Kind(lambda value: _is_finite(value) and value > 0, "a number above 0", "1.0", False),
    "stage1_pretrained_path": Kind(_is_path, "the path of one directory", "saves/stage1"),
    "hidden_cache_dir": Kind(_is_path, "the path of one directory", "saves/hidden_states"),
    "train_lm_head": Kind(lambda value: isinstance(value, bool), "true or false, without quotes", "true", False),
}


def check_values(written: Mapping[str, Any]) -> None:
    """Refuse a key's value that is of another kind.

    Args:
        written: values by their keys; keys without a kind are left alone.

    Raises:
        LMTPError: what the first such value has to be.
    """
    for key, kind in KINDS.items():
        value = written[key]
        if not (kind.fits(value) or (kind.optional and value is None)):
            raise LMTPError(
                f"{key} is {value!r}, but it has to be {kind.words}: write for instance {key}: {kind.example}."
            )


def read_offsets(written: Any) -> list[int]:
    """The extra heads' offsets from what stands behind ``leap_offsets``: text like ``2,3,6``, a list, or one number.

    Raises:
        LMTPError: something in it is no whole number.
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
