"""Detection of near-duplicate texts by word trigrams."""

from __future__ import annotations

import re
from collections import Counter, defaultdict


_WORD = re.compile(r"\w+")
# Two texts are near-duplicates if the Jaccard similarity of their sets of word trigrams is at least this.
_THRESHOLD = 0.5


class NearDuplicates:
    """A set of texts; `in` tests whether a text is a near-duplicate of one of them."""

    def __init__(self):
        self._sizes: list[int] = []
        self._texts_with: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, text: str) -> None:
        """Add a text."""
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
    """Return the word trigrams of a text, or one tuple of all words if there are fewer than three."""
    words = _WORD.findall(text.lower()) or [text]
    return {tuple(words[start : start + 3]) for start in range(max(1, len(words) - 2))}
