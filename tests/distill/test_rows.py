"""The row format: ids survive the round trip through a string."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtp_factory.distill.rows import dataset_entry, format_ids, is_self_distilled, parse_ids


@given(st.lists(st.integers(min_value=0, max_value=2**31 - 1)))
def test_ids_round_trip(ids):
    assert parse_ids(format_ids(ids)) == ids


@given(st.text(min_size=1).filter(lambda text: not text.isspace()))
def test_text_is_parsed_as_ids_only_if_it_is_decimal_numbers(text):
    if all(word.isascii() and word.isdigit() for word in text.split()):
        assert parse_ids(text) == [int(word) for word in text.split()]
    else:
        with pytest.raises(ValueError, match="not a token id"):
            parse_ids(text)


@pytest.mark.parametrize("text", ["-1", "1.0", "1,2", "0x1", "²", "١", "1_000", "+1"])
def test_numbers_that_int_reads_but_that_are_no_ids(text):
    with pytest.raises(ValueError, match="not a token id"):
        parse_ids(f"3 {text}")


def test_entry_is_recognised():
    columns = dataset_entry("a.jsonl")["columns"]
    assert is_self_distilled(SimpleNamespace(**columns))
    assert not is_self_distilled(SimpleNamespace(prompt="instruction", response="output"))
