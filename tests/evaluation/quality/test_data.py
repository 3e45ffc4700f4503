"""Rows of local files, and the sentence when the hub cannot be read."""

import json

import pytest
from helpers import benchmark_rows

from lmtp_factory.errors import LMTPError
from lmtp_factory.evaluation.quality.benchmarks import BENCHMARKS
from lmtp_factory.evaluation.quality.data import read_rows


@pytest.fixture
def data(tmp_path):
    return benchmark_rows.save(tmp_path / "data")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_local_rows(data, name):
    rows, source = read_rows(BENCHMARKS[name], str(data))
    assert rows == benchmark_rows.ROWS[name] and source == next(data.glob(f"{name}*")).name
    assert read_rows(BENCHMARKS[name], str(data), limit=1)[0] == rows[:1]


def test_missing_and_ambiguous_files(data, tmp_path):
    with pytest.raises(LMTPError, match="is no directory: name the one with mbpp"):
        read_rows(BENCHMARKS["mbpp"], str(tmp_path / "other"))
    (data / "mbpp_copy.jsonl").write_text("")
    with pytest.raises(LMTPError, match=r"has mbpp.jsonl and mbpp_copy.jsonl: keep one"):
        read_rows(BENCHMARKS["mbpp"], str(data))
    for file in data.glob("mbpp*"):
        file.unlink()
    with pytest.raises(LMTPError, match=r"has no file mbpp\*.jsonl: put it there"):
        read_rows(BENCHMARKS["mbpp"], str(data))


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("gsm8k", "{", "Line 1 of .* is no JSON"),
        ("gsm8k", "[]", "Line 1 of .* is no JSON object: write one with id, instruction and answer"),
        (
            "gsm8k",
            '{"id": "a", "instruction": "x", "answer": 12}',
            "has no answer, which gsm8k needs: write text there",
        ),
        ("gsm8k", '{"id": "a", "answer": "12"}', "has no instruction"),
        ("gsm8k", '{"id": "a", "instruction": "x", "input": 1, "answer": "1"}', "has a input that is no text"),
        ("mbpp", '{"id": "a", "instruction": "x"}', "has no test_list, which mbpp needs: write a list of texts"),
        ("mbpp", '{"id": "a", "instruction": "x", "test_list": []}', "has no test_list"),
        ("mbpp", '{"id": "a", "instruction": "x", "test_list": [1]}', "something else than texts"),
        ("humaneval", '{"id": "a", "instruction": "x", "prompt": "p", "test": "t"}', "has no entry_point"),
        ("math500", "", "has no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path, name, line, words):
    (tmp_path / f"{name}.jsonl").write_text(line + "\n")
    with pytest.raises(LMTPError, match=words):
        read_rows(BENCHMARKS[name], str(tmp_path))


def test_blank_lines_are_skipped(tmp_path):
    rows = [json.dumps(row) for row in benchmark_rows.GSM8K]
    (tmp_path / "gsm8k.jsonl").write_text("\n\n".join(rows) + "\n\n")
    assert len(read_rows(BENCHMARKS["gsm8k"], str(tmp_path))[0]) == 3


def test_a_hub_out_of_reach_is_a_sentence(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        LMTPError, match=r"openai/gsm8k cannot be read from the hub \(.*\): name a directory with gsm8k"
    ):
        read_rows(BENCHMARKS["gsm8k"], None)
