"""Geometry against the definition in words: brute force over heads and states."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtp_factory import geometry


rising = st.lists(st.integers(2, 40), min_size=1, max_size=6, unique=True).map(sorted)


def test_offsets_of_the_paper():
    assert geometry.offsets(4, 2) == (1, 3, 5, 7)
    assert geometry.offsets(3, 3) == (1, 4, 7)
    assert geometry.offsets(4, 1) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("stride", "table"),
    [(2, [(0, 0), (1, 1), (1, 0), (2, 1), (2, 0)]), (3, [(0, 0), (1, 2), (1, 1), (1, 0), (2, 2)])],
)
def test_lookback_table(stride, table):
    offsets = geometry.offsets(4, stride)
    assert [geometry.lookback(depth, offsets) for depth in range(1, 6)] == table


@given(st.integers(2, 7), st.integers(1, 6))
def test_lookback_is_the_closed_form_of_a_stride(n, k):
    offsets = geometry.offsets(n, k)
    assert geometry.reach(offsets) == k * (n - 1) + 1
    assert geometry.window(offsets) == k
    assert geometry.stride(offsets) == k
    for depth in range(1, geometry.reach(offsets) + 1):
        head = -(-(depth - 1) // k)
        assert geometry.lookback(depth, offsets) == (head, k * head - (depth - 1))


@given(rising)
def test_every_depth_is_covered_by_the_nearest_state(extra):
    offsets = geometry.check_offsets(extra)
    for depth in range(1, geometry.reach(offsets) + 1):
        head, back = geometry.lookback(depth, offsets)
        # A state `back` positions before t sees `back` tokens less: the best candidate is the one that looks back least.
        candidates = [(offset - depth, i) for i, offset in enumerate(offsets) if offset >= depth]
        assert (back, head) == min(candidates)
        assert 0 <= back < geometry.window(offsets)
    for outside in (0, geometry.reach(offsets) + 1):
        with pytest.raises(ValueError, match="outside"):
            geometry.lookback(outside, offsets)


def test_the_pairs_of_a_draft_are_the_lookback_of_its_levels():
    assert geometry.lookback_pairs((1, 2, 3, 6)) == [(1, 0), (2, 0), (3, 2), (3, 1), (3, 0)]
    assert geometry.lookback_pairs((1, 2, 3, 6), 3) == [(1, 0), (2, 0), (3, 2)]
    assert geometry.lookback_pairs((1, 2, 3, 6), 0) == []
    with pytest.raises(ValueError, match="outside"):
        geometry.lookback_pairs((1, 2, 3, 6), 6)
