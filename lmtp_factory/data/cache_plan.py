"""Which documents' hidden states go into which shard of a cache, and how large it will be."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from accelerate.utils import convert_bytes


SHARD_BYTES = 512 * 2**20
DTYPE = torch.bfloat16


def documents_digest(rows: Iterable[Sequence[int]]) -> str:
    """A fingerprint (hex) of token id lists; their order and where each one ends count."""
    hasher = hashlib.sha256()
    for row in rows:
        ids = np.asarray(row, dtype="<i8")
        hasher.update(np.asarray(ids.size, dtype="<i8").tobytes() + ids.tobytes())
    return hasher.hexdigest()[:16]


class CachePlan:
    """Which documents go into which shard.

    A shard takes documents as long as they fit into `shard_bytes`; one that is larger by itself has its own shard.

    Args:
        lengths: tokens of each document; 0 is allowed.
        hidden_size: numbers per token, two bytes each.
        shard_bytes: the most that a shard's states take.

    Attributes:
        lengths: as given.
        shards: the documents of each shard, consecutive and in order.
        tokens: in all documents.
        bytes: that all states take on disk (headers, some 100 bytes a shard, not counted).

    Raises:
        ValueError: a negative length, or a size that is not positive.
    """

    def __init__(self, lengths: Sequence[int], hidden_size: int, shard_bytes: int = SHARD_BYTES):
        lengths = np.asarray(lengths, dtype=np.int64)
        if lengths.ndim != 1 or (lengths < 0).any() or hidden_size < 1 or shard_bytes < 1:
            raise ValueError("lengths must be a list of numbers >= 0, hidden_size and shard_bytes be positive")
        self.lengths, self.hidden_size, self.shard_bytes = lengths, hidden_size, shard_bytes
        self.lengths_digest = documents_digest([lengths])
        self._starts = np.concatenate(([0], np.cumsum(lengths)))  # a document's first token, and the end
        self.tokens = int(self._starts[-1])
        self.bytes = self.tokens * hidden_size * DTYPE.itemsize
        self.shards: list[range] = []
        first, most_tokens = 0, shard_bytes // (hidden_size * DTYPE.itemsize)
        while first < self.documents:
            fitting = int(np.searchsorted(self._starts, self._starts[first] + most_tokens, side="right")) - 1
            self.shards.append(range(first, max(fitting, first + 1)))
            first = self.shards[-1].stop
        self._shard_firsts = np.asarray([shard.start for shard in self.shards], dtype=np.int64)

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self._starts) - 1

    def shape(self, shard_index: int) -> tuple[int, int]:
        """(tokens, hidden_size) of a shard's states."""
        shard = self.shards[shard_index]
        return int(self._starts[shard.stop] - self._starts[shard.start]), self.hidden_size

    def locate(self, document: int) -> tuple[int, slice]:
        """The shard of a document and its rows there.

        Raises:
            IndexError: no such document; there are no negative ones.
        """
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.documents}")
        shard_index = int(np.searchsorted(self._shard_firsts, document, side="right")) - 1
        start, stop = self._starts[document : document + 2] - self._starts[self._shard_firsts[shard_index]]
        return shard_index, slice(int(start), int(stop))

    def describe(self) -> str:
        """What the cache takes, for a sentence."""
        shards = f"{len(self.shards):,} shard{'' if len(self.shards) == 1 else 's'}"
        sizes = f"{self.tokens:,} tokens x {self.hidden_size} x {DTYPE.itemsize} bytes"
        return f"{sizes} = {convert_bytes(self.bytes)} in {shards}"
