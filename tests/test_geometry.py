"""Geometry against the definition in words: brute force over heads and states."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtp_factory import geometry
from lmtp_factory.config import LMTPConfig
from lmtp_factory.errors import LMTPError


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


@given(rising)
def test_config_keeps_the_full_offsets(extra):
    config = LMTPConfig(offsets=extra)
    assert config.offsets == (1, *extra)
    assert LMTPConfig(offsets=config.offsets).offsets == config.offsets
    assert config.num_heads == len(extra)
    assert config.stride == geometry.stride((1, *extra))


def test_config_defaults_and_round_trip(tmp_path):
    assert LMTPConfig().offsets == (1, 3, 5, 7)
    config = LMTPConfig(offsets=(2, 3, 6), head_layers=2, head_kind="shared", base_model="some/model")
    config.save_pretrained(tmp_path)
    loaded = LMTPConfig.from_pretrained(tmp_path)
    assert (loaded.offsets, loaded.head_layers, loaded.head_kind) == ((1, 2, 3, 6), 2, "shared")
    assert loaded.base_model == "some/model"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 0}, "at least one extra head"),
        ({"stride": 0}, "leap_stride is 0"),
        ({"offsets": (2, 2)}, "have to rise"),
        ({"offsets": (3, 2)}, "have to rise"),
        ({"offsets": ()}, "empty"),
        ({"offsets": (0, 3)}, "have to rise"),
        ({"offsets": (2, 3, 6), "num_heads": 2}, "names 3 heads but num_heads says 2"),
        ({"offsets": (2, 3, 6), "stride": 2}, "does not leap by"),
        ({"head_kind": "both"}, "head_kind is 'both'"),
        ({"head_layers": 0}, "head_layers is 0"),
    ],
)
def test_impossible_configs_are_refused(arguments, message):
    with pytest.raises(LMTPError, match=message):
        LMTPConfig(**arguments)
