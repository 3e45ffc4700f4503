"""The L-MTP keys: read like upstream's own, and what they say about heads."""

import pickle
import re
from dataclasses import fields

import pytest

from lmtp_factory import LMTPConfig, LMTPError


def test_arguments_are_picklable_and_parse_again():
    from llamafactory.hparams import FinetuningArguments

    first = FinetuningArguments(stage="lmtp2", leap_offsets="2,3,6")
    assert (first.stage, first.mtp_type, first.lmtp_stage) == ("sft", "lmtp2", 2)
    again = pickle.loads(pickle.dumps(first))
    assert again == first
    written = {key: first.to_dict()[key] for key in (field.name for field in fields(first) if field.init)}
    assert FinetuningArguments(**written).lmtp_stage == 2
    assert FinetuningArguments().lmtp_stage is None


def test_stages_are_offered_on_the_command_line():
    from llamafactory.hparams.parser import _TRAIN_ARGS
    from transformers import HfArgumentParser

    action = next(a for a in HfArgumentParser(_TRAIN_ARGS)._actions if a.dest == "stage")
    assert {"sft", "dpo", "lmtp1", "lmtp2"} <= set(action.choices)


def keys(**values):
    from llamafactory.hparams import FinetuningArguments

    return FinetuningArguments(**values)


def test_keys_that_are_left_out_make_the_papers_heads():
    config = keys(stage="lmtp1").heads_config(base_model="some/base")
    assert (config.offsets, config.head_layers, config.head_kind) == ((1, 3, 5, 7), 1, "own")
    assert config.base_model == "some/base"


@pytest.mark.parametrize(
    ("written", "offsets"),
    [
        ({"num_heads": 2, "leap_stride": 3}, (1, 4, 7)),
        ({"leap_offsets": "2,3,6"}, (1, 2, 3, 6)),
        ({"leap_offsets": "2,3,6", "num_heads": 3}, (1, 2, 3, 6)),
    ],
)
def test_the_keys_name_offsets_in_either_way(written, offsets):
    assert keys(stage="lmtp1", **written).heads_config().offsets == offsets


@pytest.mark.parametrize(
    ("written", "difference"),
    [
        ({}, None),
        ({"num_heads": 3, "leap_stride": 2, "head_layers": 1, "head_kind": "own"}, None),
        ({"leap_offsets": "3,5,7"}, None),
        ({"leap_offsets": "2,3,6"}, "leap_offsets 2,3,6, the heads have 3,5,7"),
        ({"num_heads": 2}, "num_heads 2, the heads have 3"),
        ({"leap_stride": 1}, "leap_stride 1, the heads have 2"),
        ({"head_layers": 2}, "head_layers 2, the heads have 1"),
        ({"head_kind": "shared"}, "head_kind shared, the heads have own"),
    ],
)
def test_only_keys_that_were_written_contradict_trained_heads(written, difference):
    assert keys(stage="lmtp2", **written).first_difference(LMTPConfig()) == difference


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"stage": "lmtp1", "mtp_type": "lmtp2"}, "stage says lmtp1 but mtp_type says lmtp2: leave one of them out."),
        ({"stage": "dpo", "mtp_type": "lmtp2"}, "mtp_type lmtp2 goes with stage: sft, not with stage: dpo."),
        ({"mtp_type": "mtp"}, "mtp_type is 'mtp', but it has to be one of lmtp1, lmtp2."),
        ({"lmtp_export": "all"}, "lmtp_export is 'all', but it has to be one of ntp, heads, custom_generate."),
        ({"lmtp_decode": "sideways"}, "lmtp_decode is 'sideways', but it has to be one of"),
    ],
)
def test_words_that_mean_nothing_are_refused(written, said):
    with pytest.raises(LMTPError, match=re.escape(said)):
        keys(**written)


def test_words_of_yaml_and_of_the_release():
    assert keys(lmtp_decode=False).lmtp_decode == "off"  # how YAML reads an unquoted off
    vanilla = keys(stage="sft", mtp_type="vanilla")
    assert (vanilla.mtp_type, vanilla.lmtp_stage) == (None, None)
