"""Filters that drop short, truncated and repetitive answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .rows import parse_ids


# In shorter answers the last heads have no targets.
MIN_TOKENS = 8
# A sequence repeated LOOP_REPEATS times in a row is a loop if it covers LOOP_SPAN tokens; a short "---" is not a loop.
LOOP_REPEATS, LOOP_SPAN = 4, 24
# An answer that repeats itself with small changes has few distinct n-grams. Checked from DISTINCT_FROM_TOKENS tokens
# on.
NGRAM, MIN_DISTINCT_SHARE, DISTINCT_FROM_TOKENS = 4, 0.4, 64


def filter_rows(rows: Iterable[dict[str, Any]], *, keep_truncated: bool) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return the rows to keep, in order, and the number of dropped rows by reason."""
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
    """Return whether the ids contain a loop, or are long and have few distinct n-grams."""
    return has_loop(ids) or (len(ids) >= DISTINCT_FROM_TOKENS and distinct_share(ids) < MIN_DISTINCT_SHARE)


def has_loop(ids: Sequence[int], repeats: int = LOOP_REPEATS, span: int = LOOP_SPAN) -> bool:
    """Return whether a sequence occurs at least `repeats` times in a row and covers at least `span` tokens in total."""
    ids = np.asarray(ids)
    for period in range(1, len(ids) // repeats + 1):
        # A run of r ids that equal those one period earlier means that r + period tokens are periodic.
        covered = _longest_run(ids[period:] == ids[:-period]) + period
        if covered >= max(span, repeats * period):
            return True
    return False


def distinct_share(ids: Sequence[int]) -> float:
    """Return the number of distinct n-grams divided by all n-grams; 1.0 if there are none."""
    grams = list(zip(*(ids[start:] for start in range(NGRAM)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def _longest_run(equal: np.ndarray) -> int:
    borders = np.flatnonzero(~np.concatenate(([False], equal, [False])))
    return int(np.diff(borders).max()) - 1
