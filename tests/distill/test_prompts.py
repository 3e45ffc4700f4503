"""Prompts from files, and the sentences for malformed ones."""

import json

import pytest

from lmtp_factory.distill.prompts import build_prompt, prompts_from_file
from lmtp_factory.errors import LMTPError


def write(tmp_path, content, name="p.jsonl"):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return path


def contents(prompts):
    return [[(message["role"], message["content"]) for message in prompt.messages] for prompt in prompts]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("Hi", [("user", "Hi")]),
        ({"prompt": "Hi"}, [("user", "Hi")]),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, [("user", "Add\n1 2")]),
        ({"instruction": "Add", "input": ""}, [("user", "Add")]),
        ({"prompt": "Hi", "system": "Be kind."}, [("system", "Be kind."), ("user", "Hi")]),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": "dropped"},
                ]
            },
            [("user", "a"), ("assistant", "b"), ("user", "c")],
        ),
    ],
)
@pytest.mark.parametrize("form", ["array", "lines"])
def test_entries_of_every_form_are_read(tmp_path, entry, expected, form):
    path = write(tmp_path, json.dumps([entry], indent=1) if form == "array" else json.dumps(entry) + "\n\n")
    assert contents(prompts_from_file(path)) == [expected]


def test_a_line_separator_inside_a_string_is_no_line_end(tmp_path):
    path = write(tmp_path, '{"prompt": "a\u2028b"}\n{"prompt": "c"}\n')
    assert [prompt.text for prompt in prompts_from_file(path)] == ["a\u2028b", "c"]


GOOD = '{"prompt": "Hi"}\n'


@pytest.mark.parametrize(
    ("content", "place", "words"),
    [
        (GOOD + "\n" + '{"prompt": "Hi"\n', "line 3", "not JSON"),
        (GOOD + "7\n", "line 2", "int"),
        (GOOD + '{"question": "Hi"}\n', "line 2", "question"),
        (GOOD + '{"prompt": ""}\n', "line 2", "prompt"),
        (GOOD + '{"prompt": "  "}\n', "line 2", "empty"),
        (GOOD + '{"messages": [{"role": "user"}]}\n', "line 2", "content"),
        (GOOD + '{"messages": [{"role": "robot", "content": "a"}]}\n', "line 2", "'robot'"),
        (GOOD + '{"messages": [{"role": "system", "content": "a"}]}\n', "line 2", "user"),
        (GOOD + '{"messages": {"role": "user"}}\n', "line 2", "dict"),
        ('[\n {"prompt": "Hi"},\n {"prompt": 5}\n]', "entry 2", "int"),
        ('[\n {"prompt": "Hi"},\n {"prompt": \n]', "line 4", "not JSON"),
    ],
)
def test_a_malformed_entry_is_named_by_its_place(tmp_path, content, place, words):
    path = write(tmp_path, content)
    with pytest.raises(LMTPError) as error:
        prompts_from_file(path)
    assert f"{path}, {place}: " in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_a_file_without_prompts(tmp_path, content):
    with pytest.raises(LMTPError, match="holds no prompts"):
        prompts_from_file(write(tmp_path, content))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LMTPError, match="No such file"):
        prompts_from_file(tmp_path / "nowhere.jsonl")
    (tmp_path / "latin1.jsonl").write_bytes('{"prompt": "é"}'.encode("latin1"))
    with pytest.raises(LMTPError, match="UTF-8"):
        prompts_from_file(tmp_path / "latin1.jsonl")


def test_messages_keep_their_own_system_text():
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert build_prompt(messages, "Rhyme.").messages == tuple(messages)
