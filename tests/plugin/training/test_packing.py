"""Which documents share a row, and the batch that comes of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmtp_factory.modeling.losses.targets import IGNORE_INDEX, leap_targets
from lmtp_factory.plugin.training.packing import MULTIPLE, arrange, pack, places


lengths = st.lists(st.integers(1, 300), min_size=1, max_size=24)


@given(lengths, st.integers(16, 4096), st.sampled_from(["sdpa", "eager", "flash_attention_2", "kernels/some-flash"]))
def test_every_document_has_one_place(sizes, hidden_size, attention):
    rows = arrange(sizes, hidden_size, attention)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(rows)
    assert "flash" not in attention or len(rows) == 1
    if attention == "eager":  # never more scores than padded rows have
        assert len(rows) * row_length(sizes, rows) ** 2 <= len(sizes) * (max(sizes) + MULTIPLE) ** 2


def row_length(sizes, rows):
    return -(-max(sum(sizes[i] for i in row) for row in rows) // MULTIPLE) * MULTIPLE


def test_thousands_of_documents_are_arranged_with_little_waste():
    sizes = [5 + (37 * i) % 60 for i in range(3000)]
    rows = arrange(sizes, 576)
    assert len(rows) * row_length(sizes, rows) < 1.1 * sum(sizes)


def test_uneven_documents_waste_little():
    sizes = [60 + (7919 * i) % 900 for i in range(32)]
    padded, packed = len(sizes) * max(sizes), arrange(sizes, 2048)
    assert len(packed) * row_length(sizes, packed) < 0.65 * padded


@given(lengths, st.integers(16, 4096))
def test_never_more_work_than_padding(sizes, hidden_size):
    def work(rows):
        return len(rows) * row_length(sizes, rows) * (6 * hidden_size + row_length(sizes, rows))

    assert work(arrange(sizes, hidden_size)) <= work([[i] for i in range(len(sizes))])


@pytest.mark.parametrize(
    ("sizes", "hidden_size", "rows"),
    [
        ([900, 200, 150, 100], 2048, 1),  # 1,350 tokens in one row, or 900 twice
        ([500, 500, 500, 500], 64, 4),  # a narrow model, where attention costs more than linear layers
        ([10, 10, 10, 10], 64, 1),
        ([700, 300, 600, 400], 512, 3),
    ],
)
def test_rows_by_hand(sizes, hidden_size, rows):
    assert len(arrange(sizes, hidden_size)) == rows


@given(lengths, st.integers(16, 4096))
def test_a_batch_holds_its_documents(sizes, hidden_size):
    documents = [
        {"input_ids": [100 * i + j % 100 for j in range(size)], "labels": [IGNORE_INDEX] + [i] * (size - 1)}
        for i, size in enumerate(sizes)
    ]
    rows = arrange(sizes, hidden_size)
    batch = pack(documents, rows, pad_token_id=7)
    assert batch["input_ids"].shape[1] % MULTIPLE == 0
    outside = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    for i, place in places(sizes, rows).items():
        assert batch["input_ids"][place].tolist() == documents[i]["input_ids"]
        assert batch["labels"][place].tolist() == documents[i]["labels"]
        assert batch["position_ids"][place].tolist() == list(range(sizes[i]))
        assert outside[place].all()
        outside[place] = False
    assert (batch["input_ids"][outside] == 7).all() and (batch["labels"][outside] == IGNORE_INDEX).all()
    # Every target is of the document that predicts it.
    targets = leap_targets(batch["labels"], 3, batch["position_ids"])
    predicted, document = targets != IGNORE_INDEX, batch["input_ids"] // 100
    assert torch.equal(document[predicted], targets[predicted])
    assert predicted.sum() == sum(max(size - 3, 0) for size in sizes)
