"""Intervals, table and files of the scores."""

import json

import pytest
from scipy.stats import binomtest

from lmtp_factory.evaluation.quality.scores import (
    Answer,
    ModelResult,
    Score,
    differing_answers,
    remarks,
    table,
    wilson_interval,
    write_results,
)


@pytest.mark.parametrize(("right", "answers"), [(0, 8), (8, 8), (1, 10), (50, 100), (263, 500), (0, 1)])
def test_wilson_interval(right, answers):
    expected = binomtest(right, answers).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson_interval(right, answers) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_bounds_solve_wilsons_equation():
    """Each bound p is where the share lies 1.96 standard errors of p away."""
    for right, answers in ((3, 17), (16, 17), (120, 200)):
        for bound in wilson_interval(right, answers):
            error = (bound * (1 - bound) / answers) ** 0.5
            assert abs(right / answers - bound) == pytest.approx(1.959964 * error, rel=1e-5)


def result(texts, rights):
    answers = [Answer("gsm8k", str(n), text, {"gsm8k": right}) for n, (text, right) in enumerate(zip(texts, rights))]
    return ModelResult("path", answers, 12.34)


@pytest.fixture
def results():
    return {
        "base": result("abcd", [1, 0, 0, 0]),
        "ntp": result("abcd", [1, 0, 0, 0]),
        "sft": result("abxy", [1, 0, 1, 1]),
    }


def test_table(results):
    assert table(results).splitlines() == [
        "                 gsm8k",
        "base   25.0 (4.6-69.9)",
        "ntp    25.0 (4.6-69.9)",
        "sft   75.0 (30.1-95.4)",
    ]
    assert results["sft"].scores == {"gsm8k": Score(3, 4)}


def test_remarks(results):
    assert differing_answers(results["base"], results["sft"]) == 2
    assert remarks(results).splitlines() == [
        "base: 4 answers in 12 seconds.",
        "ntp: 4 answers in 12 seconds.",
        "sft: 4 answers in 12 seconds.",
        "ntp and base: all answers are equal.",
        "sft and base: 2 of 4 answers differ.",
    ]
    assert remarks({"a": result(["x", "", "\n"], [1, 0, 0])}) == "a: 3 answers in 12 seconds; 2 answers are empty."


def test_files(results, tmp_path):
    write_results({"engine": "hf"}, results, tmp_path / "new")
    written = json.loads((tmp_path / "new" / "quality.json").read_text())
    assert written["engine"] == "hf"
    assert written["models"]["sft"]["scores"]["gsm8k"] == {
        "right": 3,
        "answers": 4,
        "score": 0.75,
        "interval_95": list(wilson_interval(3, 4)),
    }
    assert [model["answers_unlike_first"] for model in written["models"].values()] == [0, 0, 2]
    lines = [json.loads(line) for line in (tmp_path / "new" / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and lines[-1]["text"] == "y" and lines[-1]["model"] == "sft"
