"""Answers that are not worth training on: short, truncated or repetitive ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .rows import parse_ids


# Far heads find no target in a shorter answer.
MIN_TOKENS = 8
# A stretch repeated this often in a row is a loop if the repeats cover this many tokens: a short "---" is none.
LOOP_REPEATS, LOOP_SPAN = 4, 24
# A longer answer that repeats itself with small changes shows a small share of distinct n-grams.
NGRAM, MIN_DISTINCT_SHARE, DISTINCT_FROM_TOKENS = 4, 0.4, 64


def filter_rows(rows: Iterable[dict[str, Any]], *, keep_truncated: bool) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows to keep, in order, and the number of dropped rows by reason."""
    kept, dropped = [], Counter()
    for row in rows:
        output_ids, finish_reason = parse_ids(row["output_ids"]), row["finish_reason"]
        if len(output_ids) - (finish_reason == "stop") < MIN_TOKENS:  # the end token does not count
            dropped["too short"] += 1
        elif finish_reason == "length" and not keep_truncated:
            dropped["truncated"] += 1
        elif is_repetitive(output_ids):
            dropped["repetition loop"] += 1
        else:
            kept.append(row)
    return kept, dropped


def is_repetitive(ids: Sequence[int]) -> bool:
    """Whether some stretch is repeated over and over, or a long answer says hardly anything new."""
    return has_loop(ids) or (len(ids) >= DISTINCT_FROM_TOKENS and distinct_share(ids) < MIN_DISTINCT_SHARE)


def has_loop(ids: Sequence[int], repeats: int = LOOP_REPEATS, span: int = LOOP_SPAN) -> bool:
    """Whether some stretch stands at least `repeats` times in a row and covers at least `span` tokens in all."""
    ids = np.asarray(ids)
    for period in range(1, len(ids) // repeats + 1):
        # r positions in a row that equal the one a period earlier: a repeated stretch of r + period tokens
        covered = _longest_run(ids[period:] == ids[:-period]) + period
        if covered >= max(span, repeats * period):
            return True
    return False


def distinct_share(ids: Sequence[int]) -> float:
    """Distinct n-grams divided by all n-grams; 1.0 if there are none."""
    grams = list(zip(*(ids[start:] for start in range(NGRAM)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def _longest_run(equal: np.ndarray) -> int:
    borders = np.flatnonzero(~np.concatenate(([False], equal, [False])))
    return int(np.diff(borders).max()) - 1
