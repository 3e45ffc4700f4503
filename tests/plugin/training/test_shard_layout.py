"""Which documents lie in which shard of a hidden-state cache."""

import hashlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmtp_factory.plugin.training.shard_layout import ShardLayout, documents_digest


@given(st.lists(st.integers(0, 50)), st.integers(1, 5), st.integers(1, 400))
def test_shards_cover_every_document_once_and_keep_their_size(lengths, hidden_size, shard_bytes):
    layout = ShardLayout(lengths, hidden_size, shard_bytes)
    assert [document for shard in layout.shards for document in shard] == list(range(len(lengths)))
    for index, shard in enumerate(layout.shards):
        tokens = sum(lengths[document] for document in shard)
        assert layout.shape(index) == (tokens, hidden_size)
        assert len(shard) >= 1 and (len(shard) == 1 or tokens * hidden_size * 2 <= shard_bytes)
        if index + 1 < len(layout.shards):  # nor smaller than need be
            assert (tokens + lengths[shard.stop]) * hidden_size * 2 > shard_bytes
        for document in shard:
            before = sum(lengths[shard.start : document])
            assert layout.locate(document) == (index, slice(before, before + lengths[document]))
    assert layout.bytes == sum(lengths) * hidden_size * 2


def test_a_layout_describes_itself():
    assert ShardLayout([2**20] * 3, 576, 2**30).describe() == "3,145,728 tokens x 576 x 2 bytes = 3.38 GB in 3 shards"
    assert ShardLayout([2], 4).describe() == "2 tokens x 4 x 2 bytes = 16 bytes in 1 shard"
    assert ShardLayout([2**30] * 4, 2**11).describe().endswith(" = 16.0 TB in 4 shards")


@pytest.mark.parametrize("arguments", [([1, -1], 4), ([1], 0), ([1], 4, 0), ([[1]], 4)])
def test_impossible_lengths_and_sizes_are_refused(arguments):
    with pytest.raises(ValueError, match="lengths must be"):
        ShardLayout(*arguments)


def test_digest_is_stable_and_sees_ids_order_and_borders():
    rows = [[1, 2], [3], []]
    expected = hashlib.sha256(struct.pack("<6q", 2, 1, 2, 1, 3, 0)).hexdigest()
    for form in (list, tuple, np.array, torch.tensor):
        assert expected.startswith(documents_digest(form(row) for row in rows))
    others = [[[1], [2, 3], []], [[3], [1, 2], []], [[1, 2], [3]], [[2, 1], [3], []], [[1, 2, 3], []], []]
    assert len({documents_digest(rows) for rows in [rows, *others]}) == 1 + len(others)
