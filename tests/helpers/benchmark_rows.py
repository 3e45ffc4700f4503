"""Rows of our own in the format of the benchmarks' files, with right and wrong answers."""

import json
from pathlib import Path


GSM8K = [
    {"id": "g0", "instruction": "A frog leaps 3 stones a day. How many in 4 days?", "input": "", "answer": "12"},
    {"id": "g1", "instruction": "A pond has 1,000 frogs and 250 leave. How many stay?", "input": "", "answer": "750"},
    {"id": "g2", "instruction": "A leap costs $2. What do 600 leaps cost?", "input": "", "answer": "1200"},
]
MATH500 = [
    {"id": "m0", "instruction": "What is $1 \\div 2$?", "answer": "\\frac{1}{2}"},
    {"id": "m1", "instruction": "Factor $x^2 - 1$.", "answer": "(x-1)(x+1)"},
]
HUMANEVAL = [
    {
        "id": "h0",
        "instruction": "Complete area.",
        "prompt": 'import math\n\n\ndef area(radius):\n    """ Area of a circle. """\n',
        "entry_point": "area",
        "test": "def check(candidate):\n    assert candidate(0) == 0\n    assert abs(candidate(1) - 3.14159) < 1e-4\n",
    },
    {
        "id": "h1",
        "instruction": "Complete double.",
        "prompt": 'def double(n):\n    """ Twice n. """\n',
        "entry_point": "double",
        "test": "def check(candidate):\n    assert candidate(4) == 8\n",
    },
]
MBPP = [
    {
        "id": "b0",
        "instruction": "Write a function that adds.\nassert add(1, 2) == 3",
        "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
        "test_setup_code": "",
    },
    {
        "id": "b1",
        "instruction": "Write a function that negates.\nassert negate(1) == -1",
        "test_list": ["assert negate(one) == -1"],
        "test_setup_code": "one = 1",
    },
]
ROWS = {"gsm8k": GSM8K, "math500": MATH500, "humaneval": HUMANEVAL, "mbpp": MBPP}


def save(directory: Path) -> Path:
    """Write one file a benchmark, some with something behind the benchmark's name."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in ROWS.items():
        file = directory / f"{name}{'_test_3' if name == 'gsm8k' else ''}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return directory
