"""Texts that say nearly the same."""

from __future__ import annotations

import re
from collections import Counter, defaultdict


_WORD = re.compile(r"\w+")
# Jaccard similarity of two sets of word trigrams from which the texts count as the same.
_THRESHOLD = 0.5


class NearDuplicates:
    """Finds texts that share most of their word trigrams with a text seen before."""

    def __init__(self):
        self._sizes: list[int] = []
        self._texts_with: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, text: str) -> None:
        """Remember a text."""
        trigrams = _trigrams(text)
        for trigram in trigrams:
            self._texts_with[trigram].append(len(self._sizes))
        self._sizes.append(len(trigrams))

    def __contains__(self, text: str) -> bool:
        trigrams = _trigrams(text)
        shared = Counter(number for trigram in trigrams for number in self._texts_with.get(trigram, ()))
        return any(
            common >= _THRESHOLD * (len(trigrams) + self._sizes[number] - common) for number, common in shared.items()
        )


def _trigrams(text: str) -> set[tuple[str, ...]]:
    """Word trigrams; all words as one tuple if there are fewer than three."""
    words = _WORD.findall(text.lower()) or [text]
    return {tuple(words[start : start + 3]) for start in range(max(1, len(words) - 2))}
