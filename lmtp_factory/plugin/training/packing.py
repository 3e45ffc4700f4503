"""Several documents in one row, so that a frozen backbone computes no padding.

A batch keeps its documents and only arranges them in other rows. Positions of a document begin at 0. Attention and
the heads' targets read from them where a document ends. Losses and gradients equal those of padded rows.
"""

import heapq
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...modeling.losses.targets import IGNORE_INDEX
from ...modeling.packing_probe import WITH_MASK


# Row lengths are rounded up to a multiple of this, for tensor cores.
MULTIPLE = 8


def arrange(lengths: Sequence[int], hidden_size: int, attention: str = "sdpa") -> list[list[int]]:
    """Choose which documents share a row.

    Rows are as long as the longest one, so few rows waste little on padding. Masked attention takes time for every pair of
    positions in a row, so many rows waste little on pairs across documents. In one layer a token costs about `24 h^2`
    operations in linear layers and `4 L h` in attention over a row of length L: `1 + L / 6h` relative to the former. The
    arrangement with the smallest `rows * L * (1 + L / 6h)` is chosen.

    Args:
        lengths: Tokens of each document.
        hidden_size: The model's h.
        attention: The model's attention implementation. `eager` stores a score for every pair of positions, so it gets no
            more pairs than padded rows have. Flash kernels read borders from the positions of a single row and skip pairs
            across them, so they get one row.

    Returns:
        Document indices of each row.
    """
    if attention not in WITH_MASK:
        return [list(range(len(lengths)))]
    tokens, count = sum(lengths), len(lengths)
    most_scores = count * _row_length(lengths, [[i] for i in range(count)]) ** 2
    best, least = [], math.inf
    while count and tokens * (1 + tokens / count / (6 * hidden_size)) < least:  # the cost of `count` full rows
        rows = _balanced(lengths, count)
        length = _row_length(lengths, rows)
        if attention == "eager" and count * length**2 > most_scores:
            break
        cost = count * length * (1 + length / (6 * hidden_size))
        if cost < least:
            best, least = rows, cost
        count -= max(1, count // 20)  # sorting hundreds of documents for every count is too slow
    return best


def _balanced(lengths: Sequence[int], count: int) -> list[list[int]]:
    """`count` rows of nearly equal length: the longest remaining document is added to the shortest row."""
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, row) for row in range(count)]
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, row = filled[0]
        rows[row].append(document)
        heapq.heapreplace(filled, (tokens + lengths[document], row))
    return rows


def _row_length(lengths: Sequence[int], rows: list[list[int]]) -> int:
    """Length of the longest row, rounded up."""
    longest = max(sum(lengths[i] for i in row) for row in rows)
    return -(-longest // MULTIPLE) * MULTIPLE


def places(lengths: Sequence[int], rows: list[list[int]]) -> dict[int, tuple[int, slice]]:
    """Document index to its row and columns."""
    found = {}
    for row, members in enumerate(rows):
        start = 0
        for document in members:
            found[document] = row, slice(start, start := start + lengths[document])
    return found


def pack(documents: Sequence[dict[str, Sequence[int]]], rows: list[list[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Build a packed batch.

    Args:
        documents: Examples with `input_ids` and `labels`.
        rows: Document indices of each row, as `arrange` returns them.
        pad_token_id: Fills the end of a row. Each such token has position 0, so it is a document of its own, and no label.

    Returns:
        `input_ids`, `labels` and `position_ids`, (rows, length) each. Positions replace the attention mask.
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
