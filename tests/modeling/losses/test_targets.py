"""Targets, counts and weights of the heads, against brute force."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lmtp_factory.modeling.losses.targets import IGNORE_INDEX, count_targets, leap_targets


@st.composite
def packed_batches(draw):
    """(labels, position_ids, document of every position) with masked labels and documents of odd lengths."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    labels = draw(st.lists(st.lists(st.sampled_from([IGNORE_INDEX, 3, 5]), min_size=length, max_size=length),
                           min_size=rows, max_size=rows))  # fmt: skip
    positions, documents = [], []
    for _ in range(rows):
        lengths = []
        while sum(lengths) < length:
            lengths.append(draw(st.integers(1, 9)))
        positions.append([p for n in lengths for p in range(n)][:length])
        documents.append([d for d, n in enumerate(lengths) for _ in range(n)][:length])
    return torch.tensor(labels), torch.tensor(positions), documents


@given(packed_batches(), st.integers(1, 12))
def test_targets_never_cross_documents(batch, offset):
    labels, positions, documents = batch
    targets = leap_targets(labels, offset, positions)
    for row in range(labels.shape[0]):
        for s in range(labels.shape[1]):
            inside = s + offset < labels.shape[1] and documents[row][s] == documents[row][s + offset]
            assert targets[row, s] == (labels[row, s + offset] if inside else IGNORE_INDEX)


@given(packed_batches(), st.integers(1, 12))
def test_without_positions_a_row_is_one_document(batch, offset):
    labels, _, _ = batch
    expected = F.pad(labels[:, offset:], (0, min(offset, labels.shape[1])), value=IGNORE_INDEX)
    assert torch.equal(leap_targets(labels, offset), expected)


def test_multimodal_positions_count_by_their_first_axis():
    labels = torch.arange(6).unsqueeze(0)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    stacked = torch.stack([positions, positions * 7, positions * 0])
    assert torch.equal(leap_targets(labels, 2, stacked), leap_targets(labels, 2, positions))


def test_counts_are_per_head():
    labels = torch.tensor([[IGNORE_INDEX, 1, 2, 3, 4]])
    assert count_targets(labels, (1, 3, 5)).tolist() == [4, 2, 0]
