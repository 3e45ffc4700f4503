"""What is dropped and what is kept."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lmtp_factory.distill.filters import Filters, NearDuplicates, distinct_share, filter_rows
from lmtp_factory.distill.pipeline import split_heldout
from lmtp_factory.distill.rows import format_ids


tokens = st.integers(min_value=0, max_value=1000)


def loops_by_definition(ids, repeats, span):
    """Try every start and period: the slow way to say what a loop is."""
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
    filters = Filters(loop_repeats=repeats, loop_span=span, min_distinct=0)
    assert filters.is_loop(ids) == loops_by_definition(ids, repeats, span)


@given(st.lists(tokens, max_size=40), st.lists(tokens, min_size=1, max_size=12), st.integers(24, 30), st.lists(tokens))
def test_a_stretch_said_over_and_over_is_a_loop_wherever_it_stands(before, stretch, times, after):
    assert Filters().is_loop(before + stretch * times + after)


@given(st.lists(tokens, unique=True, max_size=300))
def test_text_that_never_repeats_is_no_loop(ids):
    assert not Filters().is_loop(ids)


def test_a_loop_with_a_changing_number_is_one_too():
    ids = [token for number in range(30) for token in (*range(12), 1000 + number)]
    assert Filters().is_loop(ids)
    assert not Filters(min_distinct=0).is_loop(ids)


@given(st.lists(tokens, min_size=4, max_size=50), st.integers(1, 5))
def test_distinct_share(ids, times):
    assume(len(set(ids)) == len(ids))
    assert distinct_share(ids) == 1
    assert 0 < distinct_share(ids * times) <= 1


@pytest.mark.parametrize(
    ("ids", "finish_reason", "options", "reason"),
    [
        (range(9), "stop", {}, None),
        (range(8), "stop", {}, "too short"),  # the end token does not count
        (range(8), "length", {"keep_truncated": True}, None),
        (range(100), "length", {}, "truncated"),
        ([1, 2] * 20, "stop", {}, "repetition loop"),
        ([1, 2] * 20, "length", {}, "truncated"),
    ],
)
def test_reasons(ids, finish_reason, options, reason):
    row = {"output_ids": format_ids(ids), "finish_reason": finish_reason}
    kept, dropped = filter_rows([row], Filters(**options))
    assert kept == ([] if reason else [row])
    assert dict(dropped) == ({reason: 1} if reason else {})


@pytest.mark.parametrize(
    ("text", "alike"),
    [
        ("How do I boil an egg so that the yolk stays soft?", True),
        ("how do I boil an egg, so that the yolk stays runny", True),
        ("How do I boil pasta so that it does not stick?", False),
        ("Hello!", True),
        ("Hello there", False),
        ("???", False),
    ],
)
def test_near_duplicates(text, alike):
    seen = NearDuplicates()
    seen.add("How do I boil an egg so that the yolk stays soft?")
    seen.add("hello")
    assert (text in seen) == alike


def test_heldout_rows_have_no_twin_in_training():
    topics = ["birds", "trains", "soup", "chess", "rivers", "maps", "paint", "glass", "wool", "bells"]
    rows = [
        {
            "id": 2 * number + twin,
            "prompt_ids": f"{number} {twin}",
            "instruction": f"Tell me all there is about {topic}{end}",
        }
        for number, topic in enumerate(f"{a} {b}" for a in topics for b in topics)
        for twin, end in enumerate([" please", " please!"])
    ]
    heldout, train, dropped = split_heldout(rows, 0.1)
    assert len(heldout) == 20
    assert dropped > 0
    assert len(heldout) + len(train) + dropped == len(rows)
    words = [{row["instruction"].rstrip("!") for row in part} for part in (heldout, train)]
    assert not words[0] & words[1]
    assert split_heldout(rows[::-1], 0.1)[0] == heldout[::-1]
