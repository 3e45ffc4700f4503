"""What is asked and which program tests an answer."""

import pytest
from helpers.benchmark_rows import HUMANEVAL, MBPP, ROWS

from lmtp_factory.errors import LMTPError
from lmtp_factory.evaluation.quality.benchmarks import BENCHMARKS, chosen, code_block


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Sure:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```\n```python\nx = 2\n```", "x = 1\n"),
        ("```python\nx = 1\ny = 2", "x = 1\ny = 2"),
        ("```x = 1```", "x = 1"),
        ("x = 1\n", "x = 1\n"),
        ("", ""),
    ],
)
def test_code_block(answer, code):
    assert code_block(answer) == code


def passes(program):
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize(
    ("code", "right"),
    [
        ("def area(radius):\n    return math.pi * radius**2\n", True),
        ("import math\n\ndef area(radius):\n    return math.pi * radius**2", True),
        ("    return math.pi * radius**2\n", True),
        ("def area(radius):\n    return 3 * radius**2\n", False),
        ("", False),
    ],
)
def test_humaneval_program(code, right):
    assert passes(BENCHMARKS["humaneval"].program(HUMANEVAL[0], code)) == right


def test_mbpp_program():
    program = BENCHMARKS["mbpp"].program
    assert passes(program(MBPP[0], "def add(a, b): return a + b"))
    assert not passes(program(MBPP[0], "def add(a, b): return 3"))
    assert passes(program(MBPP[1], "def negate(n): return -n"))


def test_prompts_end_with_the_form_of_the_answer():
    prompts = {name: BENCHMARKS[name].prompt(rows[0]) for name, rows in ROWS.items()}
    assert all(prompts[name].startswith(rows[0]["instruction"]) for name, rows in ROWS.items())
    assert "####" in prompts["gsm8k"] and "\\boxed{}" in prompts["math500"] and "code block" in prompts["mbpp"]
    assert BENCHMARKS["gsm8k"].prompt({"instruction": "one", "input": "two"}).startswith("one\ntwo\n")


# Rows of the hub's layouts.
HUB_ROWS = {
    "gsm8k": {"question": "How many?", "answer": "It is 3 * 4 = <<3*4=12>>12.\n#### 12"},
    "math500": {"problem": "Half?", "solution": "\\boxed{0.5}", "answer": "0.5", "unique_id": "test/a/1.json"},
    "humaneval": {
        "task_id": "HumanEval/0", "prompt": 'def f():\n    """One."""\n', "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n", "entry_point": "f",
    },
    "mbpp": {
        "task_id": 11, "text": "Return 1.", "code": "def f(): return 1", "test_list": ["assert f() == 1"],
        "test_setup_code": "",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_of_the_hub_become_rows_of_a_file(name):
    benchmark = BENCHMARKS[name]
    row = benchmark.hub.to_row(HUB_ROWS[name], 0)
    assert {"id", "instruction", *benchmark.fields} <= row.keys()
    assert benchmark.prompt(row)
    if name == "gsm8k":
        assert row["answer"] == "12"
    if benchmark.runs_code:
        assert passes(benchmark.program(row, "def f(): return 1"))


def test_tasks_are_chosen_by_name():
    assert [benchmark.name for benchmark in chosen("math500, gsm8k", allow_code=False)] == ["math500", "gsm8k"]
    assert [benchmark.name for benchmark in chosen("mbpp", allow_code=True)] == ["mbpp"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("gsm8k,mmlu", "--tasks names mmlu, which is no task: write some of gsm8k, math500, humaneval, mbpp."),
        ("gsm8k,gsm8k", "--tasks is 'gsm8k,gsm8k', but it has to name tasks once each"),
        (" , ", "name tasks once each"),
        ("gsm8k,humaneval", "humaneval runs code that the model wrote: add --allow-code"),
        ("humaneval,mbpp", "humaneval and mbpp run code that the model wrote"),
    ],
)
def test_refusals(names, words):
    with pytest.raises(LMTPError) as refused:
        chosen(names, allow_code=False)
    assert words in str(refused.value)
