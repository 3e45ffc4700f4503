"""The benchmarks: what a model is asked, what a right answer is, and where the rows lie on the hub.

A row is a dictionary with `id`, `instruction`, an optional `input`, and the fields in `Benchmark.fields`. Rows of the
hub's datasets are turned into such rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import LMTPError


Row = Mapping[str, Any]


@dataclass(frozen=True)
class Hub:
    """A dataset on the hub.

    Attributes:
        path: Its id.
        name: Its configuration.
        to_row: Turns a row of it, and the row's number, into ours.
    """

    path: str
    name: str | None
    to_row: Callable[[Row, int], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Benchmark:
    """One task.

    Attributes:
        name: The task's name, and the beginning of its file's name.
        fields: Field of a row -> its type, beside `id` and `instruction`.
        hub: The dataset, split `test`.
        request: Text after the instruction that asks for the form of the answer.
        scores: Names of the scores, the main one first; columns of the table.
        program: For tasks that run code: the program that tests an answer's code, given row and code.
    """

    name: str
    fields: Mapping[str, type]
    hub: Hub
    request: str
    scores: tuple[str, ...]
    program: Callable[[Row, str], str] | None = None

    @property
    def runs_code(self) -> bool:
        """Whether scoring executes what the model wrote."""
        return self.program is not None

    def prompt(self, row: Row) -> str:
        """Return the user's message."""
        parts = [row["instruction"], row.get("input") or "", self.request]
        return "\n".join(part for part in parts if part)


def code_block(answer: str) -> str:
    """Return the first fenced block of an answer, or all of an answer without one. A block that was cut counts."""
    _, fence, rest = answer.partition("```")
    if not fence:
        return answer
    first_line, newline, code = rest.partition("\n")
    if not newline or "```" in first_line:
        code = rest
    return code.partition("```")[0]


def humaneval_program(row: Row, code: str) -> str:
    """Return prompt, code and test.

    The prompt (imports, helpers, signature and docstring) stands before the code, so that code may repeat it, leave out
    its helpers, or be the function's body alone.
    """
    prompt = row["prompt"].rstrip("\n")
    return f"{prompt}\n{code}\n{row['test']}\ncheck({row['entry_point']})\n"


def mbpp_program(row: Row, code: str) -> str:
    """Return setup, code and assertions."""
    return "\n".join([row.get("test_setup_code") or "", code, *row["test_list"], ""])


def _gsm8k_row(row: Row, number: int) -> dict[str, Any]:
    answer = row["answer"].rpartition("####")[2].strip()
    return {"id": f"gsm8k_{number}", "instruction": row["question"], "answer": answer}


def _math500_row(row: Row, number: int) -> dict[str, Any]:
    return {"id": f"math500_{number}", "instruction": row["problem"], "answer": row["answer"]}


def _humaneval_row(row: Row, number: int) -> dict[str, Any]:
    asked = "Complete the following Python function. Return the whole function in one Python code block."
    return {
        "id": f"humaneval_{number}",
        "instruction": f"{asked}\n\n```python\n{row['prompt']}```",
        **{field: row[field] for field in ("prompt", "test", "entry_point")},
    }


def _mbpp_row(row: Row, number: int) -> dict[str, Any]:
    tests = "\n".join(row["test_list"])
    return {
        "id": f"mbpp_{row['task_id']}",
        "instruction": f"{row['text']}\nYour code should pass these tests:\n{tests}",
        "test_list": row["test_list"],
        "test_setup_code": row["test_setup_code"],
    }


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "gsm8k",
            {"answer": str},
            Hub("openai/gsm8k", "main", _gsm8k_row),
            # Without an example, whose number small models would repeat.
            "Solve it step by step. Write #### and the final number on the last line.",
            ("gsm8k", "gsm8k last number"),
        ),
        Benchmark(
            "math500",
            {"answer": str},
            Hub("HuggingFaceH4/MATH-500", None, _math500_row),
            "Write the final answer in \\boxed{}.",
            ("math500",),
        ),
        Benchmark(
            "humaneval",
            {"prompt": str, "test": str, "entry_point": str},
            Hub("openai/openai_humaneval", None, _humaneval_row),
            "",
            ("humaneval",),
            humaneval_program,
        ),
        Benchmark(
            "mbpp",
            {"test_list": list},
            Hub("google-research-datasets/mbpp", "full", _mbpp_row),
            "Return the code in one Python code block.",
            ("mbpp",),
            mbpp_program,
        ),
    )
}


def chosen(names: str, allow_code: bool) -> list[Benchmark]:
    """Return the benchmarks of a comma-separated list of names.

    Args:
        names: For instance `gsm8k,mbpp`.
        allow_code: Whether the user agrees to run what models write.

    Raises:
        LMTPError: A name is unknown or stands twice, or a benchmark runs code without `allow_code`.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = ", ".join(BENCHMARKS)
    if not wanted or len(set(wanted)) < len(wanted):
        raise LMTPError(f"--tasks is {names!r}, but it has to name tasks once each: write some of {known}.")
    for name in wanted:
        if name not in BENCHMARKS:
            raise LMTPError(f"--tasks names {name}, which is no task: write some of {known}.")
    code = [name for name in wanted if BENCHMARKS[name].runs_code]
    if code and not allow_code:
        raise LMTPError(
            f"{' and '.join(code)} run{'s' * (len(code) == 1)} code that the model wrote: add --allow-code to run it in a "
            "sandbox, or leave it out of --tasks."
        )
    return [BENCHMARKS[name] for name in wanted]
