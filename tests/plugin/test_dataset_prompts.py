"""Prompts of datasets that LLaMA-Factory reads."""

import json

import pytest

from lmtp_factory.errors import LMTPError
from lmtp_factory.plugin.dataset_prompts import prompts_from_dataset


ROLES = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


@pytest.mark.parametrize(
    ("entry", "row", "expected"),
    [
        ({}, {"instruction": "Add", "input": "1 2", "output": "3"}, [("user", "Add\n1 2")]),
        (
            {"formatting": "sharegpt"},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
            [("user", "Hi")],
        ),
        (
            {"formatting": "openai", "columns": {"messages": "messages"}, "tags": {**ROLES, "system_tag": "system"}},
            {
                "messages": [
                    {"role": "system", "content": "Be kind."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Ho"},
                ]
            },
            [("system", "Be kind."), ("user", "Hi")],
        ),
        (
            {"columns": {"prompt": "prompt_ids", "response": "output_ids"}},
            {"instruction": "Hi", "output": "Ho", "prompt_ids": "1 2", "output_ids": "3"},
            [("user", "Hi")],
        ),
    ],
    ids=["alpaca", "sharegpt", "openai", "self-distilled"],
)
def test_registered_datasets(tmp_path, entry, row, expected):
    (tmp_path / "d.json").write_text(json.dumps([row, row]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"file_name": "d.json", **entry}}))
    prompts, skipped = prompts_from_dataset(["d"], str(tmp_path))
    for prompt in prompts:
        assert [(message["role"], message["content"]) for message in prompt.messages] == expected
    assert len(prompts) == 2
    assert skipped == 0


def test_an_unknown_dataset(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(LMTPError, match="Undefined dataset d"):
        prompts_from_dataset(["d"], str(tmp_path))


def test_rows_without_user_text_are_counted(tmp_path):
    rows = [{"instruction": text, "input": "", "output": "Ho"} for text in ("Hi", " ")]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"file_name": "d.json"}}))
    prompts, skipped = prompts_from_dataset(["d"], str(tmp_path))
    assert [prompt.text for prompt in prompts] == ["Hi"]
    assert skipped == 1


def test_a_missing_column_is_named(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([{"question": "Hi", "output": "Ho"}]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"file_name": "d.json"}}))
    with pytest.raises(LMTPError, match="no column 'instruction'"):
        prompts_from_dataset(["d"], str(tmp_path))
