"""Answers that are dropped and answers that are kept."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lmtp_factory.distill.filters import distinct_share, filter_rows, has_loop, is_repetitive
from lmtp_factory.distill.rows import format_ids


tokens = st.integers(min_value=0, max_value=1000)


def has_loop_by_definition(ids, repeats, span):
    """Try every start and every period."""
    for period in range(1, len(ids) + 1):
        for start in range(len(ids)):
            end = start + period
            while end < len(ids) and ids[end] == ids[end - period]:
                end += 1
            if end - start >= max(span, repeats * period):
                return True
    return False


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(2, 4), st.integers(2, 12))
def test_loops_are_found_as_defined(ids, repeats, span):
    assert has_loop(ids, repeats, span) == has_loop_by_definition(ids, repeats, span)


@given(st.lists(tokens, max_size=40), st.lists(tokens, min_size=1, max_size=12), st.integers(24, 30), st.lists(tokens))
def test_a_repeated_stretch_is_a_loop_at_any_place(before, stretch, times, after):
    assert is_repetitive(before + stretch * times + after)


@given(st.lists(tokens, unique=True, max_size=300))
def test_text_that_never_repeats_is_no_loop(ids):
    assert not is_repetitive(ids)


def test_a_loop_with_a_changing_number_is_repetitive():
    ids = [token for number in range(30) for token in (*range(12), 1000 + number)]
    assert is_repetitive(ids)
    assert not has_loop(ids)


@given(st.lists(tokens, min_size=4, max_size=50), st.integers(1, 5))
def test_distinct_share(ids, times):
    assume(len(set(ids)) == len(ids))
    assert distinct_share(ids) == 1
    assert 0 < distinct_share(ids * times) <= 1


@pytest.mark.parametrize(
    ("ids", "finish_reason", "keep_truncated", "reason"),
    [
        (range(9), "stop", False, None),
        (range(8), "stop", False, "too short"),  # the end token does not count
        (range(8), "length", True, None),
        (range(100), "length", False, "truncated"),
        ([1, 2] * 20, "stop", False, "repetition loop"),
        ([1, 2] * 20, "length", False, "truncated"),
        ([1, 2] * 20, "length", True, "repetition loop"),
    ],
)
def test_reasons(ids, finish_reason, keep_truncated, reason):
    row = {"output_ids": format_ids(ids), "finish_reason": finish_reason}
    kept, dropped = filter_rows([row], keep_truncated=keep_truncated)
    assert kept == ([] if reason else [row])
    assert dict(dropped) == ({reason: 1} if reason else {})
