"""Several documents in one row, so that a frozen backbone computes no padding.

A batch keeps its documents, only their places change: each document has positions of its own that begin at 0, which is how
attention, and the targets of the heads, know where it ends. Losses and gradients are those of padded rows.
"""

import heapq
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..modeling.losses.targets import IGNORE_INDEX
from ..modeling.packing_probe import WITH_MASK


# Lengths of rows are rounded up to this; tensor cores want it.
MULTIPLE = 8


def arrange(lengths: Sequence[int], hidden_size: int, attention: str = "sdpa") -> list[list[int]]:
    """Which documents share a row.

    Rows are as long as the longest, so few rows waste little; but with a mask attention takes time for every pair of
    positions in a row, so many rows waste little of that. In a layer a token costs some ``24 h^2`` operations of linear
    layers and ``4 L h`` of attention in a row of L: ``1 + L / 6h`` of the former. The arrangement with the least of
    ``rows * L * (1 + L / 6h)`` is taken.

    Args:
        lengths: tokens of each document.
        hidden_size: the model's h.
        attention: the model's implementation. ``eager`` keeps a score for every pair of positions: it gets no more of
            them than padded rows have. Flash kernels take borders from positions in a single row only, and no time for
            pairs across them: they get one row.

    Returns:
        Of each row the documents' indices.
    """
    if attention not in WITH_MASK:
        return [list(range(len(lengths)))]
    tokens, count = sum(lengths), len(lengths)
    most_scores = count * _row_length(lengths, [[i] for i in range(count)]) ** 2
    best, least = [], math.inf
    while count and tokens * (1 + tokens / count / (6 * hidden_size)) < least:  # what `count` full rows would cost
        rows = _balanced(lengths, count)
        length = _row_length(lengths, rows)
        if attention == "eager" and count * length**2 > most_scores:
            break
        cost = count * length * (1 + length / (6 * hidden_size))
        if cost < least:
            best, least = rows, cost
        count -= max(1, count // 20)  # of hundreds of documents not every count is worth its sorting
    return best


def _balanced(lengths: Sequence[int], count: int) -> list[list[int]]:
    """``count`` rows of nearly equal length: the longest document left goes into the shortest row."""
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, row) for row in range(count)]
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, row = filled[0]
        rows[row].append(document)
        heapq.heapreplace(filled, (tokens + lengths[document], row))
    return rows


def _row_length(lengths: Sequence[int], rows: list[list[int]]) -> int:
    """Of all rows: the longest, rounded up."""
    longest = max(sum(lengths[i] for i in row) for row in rows)
    return -(-longest // MULTIPLE) * MULTIPLE


def places(lengths: Sequence[int], rows: list[list[int]]) -> dict[int, tuple[int, slice]]:
    """Row and columns of every document."""
    found = {}
    for row, members in enumerate(rows):
        start = 0
        for document in members:
            found[document] = row, slice(start, start := start + lengths[document])
    return found


def pack(documents: Sequence[dict[str, Sequence[int]]], rows: list[list[int]], pad_token_id: int) -> dict[str, Tensor]:
    """A batch of ``rows`` of documents.

    Args:
        documents: with ``input_ids`` and ``labels``.
        rows: as :func:`arrange` returns them.
        pad_token_id: fills up what is left of a row; each such token is a document of its own, without a label.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids``, (rows, length) each. There is no attention mask: positions say it.
    """
    lengths = [len(document["input_ids"]) for document in documents]
    shape = len(rows), _row_length(lengths, rows)
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "labels": torch.full(shape, IGNORE_INDEX),
        "position_ids": torch.zeros(shape, dtype=torch.long),
    }
    for document, place in places(lengths, rows).items():
        batch["input_ids"][place] = torch.as_tensor(documents[document]["input_ids"])
        batch["labels"][place] = torch.as_tensor(documents[document]["labels"])
        batch["position_ids"][place] = torch.arange(lengths[document])
    return batch
