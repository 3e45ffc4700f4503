"""The configuration of leap heads: what it takes, and what survives being written and read."""

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from lmtp_factory import LMTPConfig, LMTPError, geometry


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_heads": 2.0}, r"num_heads is 2\.0, but it has to be a whole number"),
        ({"num_heads": True}, "num_heads is True, but it has to be a whole number"),
        ({"stride": "2"}, "leap_stride is '2', but it has to be a whole number"),
        ({"offsets": "2,3,6"}, "leap_offsets is '2,3,6', but it has to be a list of whole numbers"),
        ({"offsets": (2, 3.0)}, r"leap_offsets is \(2, 3\.0\), but it has to be a list of whole numbers"),
        ({"offsets": 3}, "leap_offsets is 3, but it has to be a list of whole numbers"),
        ({"head_layers": "1"}, "head_layers is '1', but it has to be a whole number"),
        ({"head_layers": False}, "head_layers is False, but it has to be a whole number"),
        ({"hidden_size": 8.0}, r"hidden_size is 8\.0, but it has to be a whole number"),
        ({"vocab_size": 0}, "vocab_size is 0, but it has to be 1 or more"),
        ({"head_kind": None}, "head_kind is None, but it has to be one of own, shared"),
        ({"tokenizer_fingerprint": 7}, "tokenizer_fingerprint is 7, but it has to be text"),
        ({"head_weight": 0.1}, "has no head_weight: leave it out"),
        ({"leap_stride": 2}, "has no leap_stride: leave it out"),
    ],
)
def test_wrong_arguments_are_refused(wrong, said):
    with pytest.raises(LMTPError, match=said):
        LMTPConfig(**wrong)


def test_numbers_of_other_libraries_are_numbers():
    import numpy as np

    config = LMTPConfig(offsets=np.array([2, 3, 6]), head_layers=np.int64(2))
    assert config.offsets == (1, 2, 3, 6)
    assert {type(number) for number in (*config.offsets, config.head_layers)} == {int}
    assert LMTPConfig(offsets=range(2, 5)).offsets == (1, 2, 3, 4)


def test_it_survives_being_written_and_read(tmp_path):
    config = LMTPConfig(
        offsets=(2, 3, 6), head_layers=2, head_kind="shared", hidden_size=8, vocab_size=32, base_model="b"
    )
    config.save_pretrained(tmp_path)
    again = [
        AutoConfig.from_pretrained(tmp_path),
        LMTPConfig.from_pretrained(tmp_path, attn_implementation="eager", dtype="bfloat16"),
        LMTPConfig.from_dict(config.to_dict()),
        LMTPConfig.from_dict(config.to_diff_dict()),
        LMTPConfig(**config.to_dict()),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ]
    for other in again:
        facts = (
            other.offsets,
            other.head_layers,
            other.head_kind,
            other.hidden_size,
            other.vocab_size,
            other.base_model,
        )
        assert facts == ((1, 2, 3, 6), 2, "shared", 8, 32, "b")


rising = st.lists(st.integers(2, 40), min_size=1, max_size=6, unique=True).map(sorted)


@given(rising)
def test_config_keeps_the_full_offsets(extra):
    config = LMTPConfig(offsets=extra)
    assert config.offsets == (1, *extra)
    assert LMTPConfig(offsets=config.offsets).offsets == config.offsets
    assert config.num_heads == len(extra)
    assert config.stride == geometry.stride((1, *extra))


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
