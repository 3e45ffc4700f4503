"""The leap loss against brute force and against its eager twin."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtp_factory.modeling.loss import (
    IGNORE_INDEX,
    chunk_rows,
    chunked_cross_entropy,
    count_targets,
    eager_cross_entropy,
    head_weights,
    leap_targets,
)


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


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 7, 64])
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_chunked_equals_eager(rows, rows_per_chunk):
    torch.manual_seed(rows)
    hidden = torch.randn(rows, 11, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(101, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 101, (rows,))
    targets[:: max(rows // 3, 2)] = IGNORE_INDEX

    def project(x):
        return F.silu(x) @ weight.T

    eager, eager_hits = eager_cross_entropy(hidden, targets, project)
    expected = torch.autograd.grad(3 * eager, (hidden, weight))
    chunked, chunked_hits = chunked_cross_entropy(hidden, targets, project, [weight], rows_per_chunk)
    gradients = torch.autograd.grad(3 * chunked, (hidden, weight))
    torch.testing.assert_close(chunked, eager, rtol=1e-5, atol=1e-5)
    assert chunked_hits == eager_hits
    for ours, theirs in zip(gradients, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_no_valid_target_gives_zero_loss_and_zero_gradients():
    weight = torch.randn(7, 3, requires_grad=True)
    loss, hits = chunked_cross_entropy(
        torch.randn(4, 3), torch.full((4,), IGNORE_INDEX), lambda x: x @ weight.T, [weight], 2
    )
    loss.backward()
    assert loss == 0 and hits == 0
    assert torch.equal(weight.grad, torch.zeros_like(weight))  # and not None: DDP waits for every parameter


def test_only_one_chunk_of_logits_exists_at_a_time():
    seen = []

    def project(x):
        seen.append(x.shape[0])
        return x @ torch.zeros(3, 50)

    targets = torch.zeros(40, dtype=torch.long)
    targets[:10] = IGNORE_INDEX
    chunked_cross_entropy(torch.randn(40, 3), targets, project, [], 8)
    assert seen == [8, 8, 8, 6]  # masked rows are dropped before the projection


@settings(max_examples=30)
@given(st.integers(1, 300_000))
def test_chunk_fits_its_budget(vocab_size):
    rows = chunk_rows(vocab_size)
    assert rows >= 1
    assert rows == 1 or rows * vocab_size * 12 <= 256 * 2**20


def test_evaluation_takes_no_gradients(monkeypatch):
    weight = torch.randn(7, 3, requires_grad=True)
    targets = torch.tensor([1, 2])
    expected, _ = chunked_cross_entropy(torch.ones(2, 3), targets, lambda x: x @ weight.T, [weight], 1)
    monkeypatch.setattr(torch.autograd, "grad", None)
    with torch.no_grad():
        loss, _ = chunked_cross_entropy(torch.ones(2, 3), targets, lambda x: x @ weight.T, [weight], 1)
    assert loss == expected and not loss.requires_grad


def test_a_second_backward_fails_rather_than_lies():
    weight = torch.randn(7, 3, requires_grad=True)
    loss, _ = chunked_cross_entropy(torch.ones(2, 3), torch.tensor([1, 2]), lambda x: x @ weight.T, [weight], 1)
    loss.backward(retain_graph=True)
    with pytest.raises(TypeError):
        loss.backward()


def test_weights_of_the_stages():
    assert head_weights(3, 1, head_weight=0.1, head_decay=0.5) == [1.0, 0.5, 0.25]
    assert head_weights(2, 2, head_weight=0.1, head_decay=1.0) == [1.0, 0.1, 0.1]
