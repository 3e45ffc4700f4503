"""Layout of a cache of hidden states: the documents of each shard, and sizes."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch


SHARD_BYTES = 512 * 2**20
DTYPE = torch.bfloat16


def documents_digest(rows: Iterable[Sequence[int]]) -> str:
    """Fingerprint (hex) of lists of token ids; it depends on their order and on where each one ends."""
    hasher = hashlib.sha256()
    for row in rows:
        ids = np.asarray(row, dtype="<i8")
        hasher.update(np.asarray(ids.size, dtype="<i8").tobytes() + ids.tobytes())
    return hasher.hexdigest()[:16]


class ShardLayout:
    """The documents of each shard.

    A shard holds consecutive documents of at most `shard_bytes`. A larger document has a shard of its own.

    Args:
        lengths: Tokens of each document; 0 is allowed.
        hidden_size: Width of the hidden states.
        shard_bytes: Largest size of a shard's states.

    Attributes:
        lengths: Tokens of each document.
        shards: Documents of each shard, consecutive and in order.
        tokens: Tokens of all documents.
        bytes: Size of all states on disk, without headers (about 100 bytes a shard).

    Raises:
        ValueError: A length is negative, or a size is not positive.
    """

    def __init__(self, lengths: Sequence[int], hidden_size: int, shard_bytes: int = SHARD_BYTES):
        lengths = np.asarray(lengths, dtype=np.int64)
        if lengths.ndim != 1 or (lengths < 0).any() or hidden_size < 1 or shard_bytes < 1:
            raise ValueError("lengths must be a list of numbers >= 0, hidden_size and shard_bytes be positive")
        self.lengths, self.hidden_size, self.shard_bytes = lengths, hidden_size, shard_bytes
        self.lengths_digest = documents_digest([lengths])
        self._starts = np.concatenate(([0], np.cumsum(lengths)))  # first token of each document, and the end
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
        """Number of documents."""
        return len(self._starts) - 1

    def shape(self, shard_index: int) -> tuple[int, int]:
        """Shape (tokens, hidden_size) of a shard's states."""
        shard = self.shards[shard_index]
        return int(self._starts[shard.stop] - self._starts[shard.start]), self.hidden_size

    def locate(self, document: int) -> tuple[int, slice]:
        """Shard of a document, and the document's rows in it.

        Raises:
            IndexError: There is no such document; negative indices are not accepted.
        """
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.documents}")
        shard_index = int(np.searchsorted(self._shard_firsts, document, side="right")) - 1
        start, stop = self._starts[document : document + 2] - self._starts[self._shard_firsts[shard_index]]
        return shard_index, slice(int(start), int(stop))

    def describe(self) -> str:
        """Size of the cache as part of a sentence."""
        from accelerate.utils import convert_bytes  # imported here: benchmarks fill caches without accelerate

        shards = f"{len(self.shards):,} shard{'' if len(self.shards) == 1 else 's'}"
        sizes = f"{self.tokens:,} tokens x {self.hidden_size} x {DTYPE.itemsize} bytes"
        return f"{sizes} = {convert_bytes(self.bytes)} in {shards}"
