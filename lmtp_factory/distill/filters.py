"""Which answers are worth training on, and which prompts say the same thing twice."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .rows import parse_ids


_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Filters:
    """Thresholds; the unit is the token.

    Attributes:
        min_tokens: shorter answers are dropped: far heads find no target in them.
        keep_truncated: keep answers that were cut at the token limit.
        loop_repeats: a stretch said this many times in a row is a loop, ...
        loop_span: ... if it covers at least so many tokens in all (a short "---" is no loop).
        min_distinct: an answer with a smaller share of distinct 4-grams is a loop in slow motion; judged from 64
            tokens on.
    """

    min_tokens: int = 8
    keep_truncated: bool = False
    loop_repeats: int = 4
    loop_span: int = 24
    min_distinct: float = 0.4

    def reason_to_drop(self, output_ids: Sequence[int], finish_reason: str) -> str | None:
        """`too short`, `truncated`, `repetition loop`, or None for an answer to keep."""
        if len(output_ids) - (finish_reason == "stop") < self.min_tokens:
            return "too short"
        if finish_reason == "length" and not self.keep_truncated:
            return "truncated"
        if self.is_loop(output_ids):
            return "repetition loop"
        return None

    def is_loop(self, output_ids: Sequence[int]) -> bool:
        """Whether some stretch is said over and over, or hardly anything new is said."""
        ids = np.asarray(output_ids)
        for period in range(1, len(ids) // self.loop_repeats + 1):
            # a run of r positions equal to the one a period earlier is r + period tokens of one repeated stretch
            covered = _longest_run(ids[period:] == ids[:-period]) + period
            if covered >= self.loop_span and covered >= self.loop_repeats * period:
                return True
        return len(ids) >= 64 and distinct_share(output_ids) < self.min_distinct


def _longest_run(equal: np.ndarray) -> int:
    borders = np.flatnonzero(~np.concatenate(([False], equal, [False])))
    return int(np.diff(borders).max()) - 1


def distinct_share(ids: Sequence[int], order: int = 4) -> float:
    """Distinct n-grams over all n-grams of a sequence, 1.0 when there is none."""
    grams = list(zip(*(ids[start:] for start in range(order)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def filter_rows(rows: Iterable[dict[str, Any]], filters: Filters) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows to keep, in order, and how many were dropped for which reason."""
    kept, dropped = [], Counter()
    for row in rows:
        reason = filters.reason_to_drop(parse_ids(row["output_ids"]), row["finish_reason"])
        if reason is None:
            kept.append(row)
        else:
            dropped[reason] += 1
    return kept, dropped


class NearDuplicates:
    """Finds texts that share most of their word trigrams with one seen before.

    Args:
        threshold: Jaccard similarity of the trigram sets from which two texts count as the same.
    """

    def __init__(self, threshold: float = 0.5):
        self.threshold = threshold
        self._sizes: list[int] = []
        self._texts_with: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, text: str) -> None:
        """Remember a text."""
        shingles = self._shingles(text)
        for shingle in shingles:
            self._texts_with[shingle].append(len(self._sizes))
        self._sizes.append(len(shingles))

    def __contains__(self, text: str) -> bool:
        shingles = self._shingles(text)
        shared = Counter(number for shingle in shingles for number in self._texts_with.get(shingle, ()))
        return any(
            common >= self.threshold * (len(shingles) + self._sizes[number] - common)
            for number, common in shared.items()
        )

    @staticmethod
    def _shingles(text: str) -> set[tuple[str, ...]]:
        words = _WORD.findall(text.lower()) or [text]
        # short texts have no trigram: all their words are one
        return {tuple(words[start : start + 3]) for start in range(max(1, len(words) - 2))}
