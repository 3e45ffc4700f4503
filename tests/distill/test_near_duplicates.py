"""Texts that count as the same, and texts that do not."""

import pytest

from lmtp_factory.distill.near_duplicates import NearDuplicates


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
