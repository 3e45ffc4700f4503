"""Benchmarks as tasks of lm-evaluation-harness (`lm_eval`), which asks the model and scores the answers."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import LMTPError, first_line
from .benchmarks import Benchmark, Row, code_block
from .code_sandbox import run_program
from .scores import Answer


if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

# The filters of lm_eval's own gsm8k task -> our names of the scores.
_GSM8K_SCORES = {"strict-match": "gsm8k", "flexible-extract": "gsm8k last number"}
_NUMBER = r"-?\$?\d[\d,.]*"
_GSM8K_SCORING = {
    "filter_list": [
        # The default pattern of the filter is the number after ####.
        {"name": "strict-match", "filter": [{"function": "regex"}, {"function": "take_first"}]},
        {
            "name": "flexible-extract",
            "filter": [
                {"function": "regex", "regex_pattern": _NUMBER, "group_select": -1},
                {"function": "take_first"},
            ],
        },
    ],
    "metric_list": [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            "regexes_to_ignore": [",", r"\$", r"\.$"],
        }
    ],
}


def check_installed() -> None:
    """Check that lm_eval can be imported, without importing it.

    Raises:
        LMTPError: It is not installed.
    """
    for package in ("lm_eval", "aiohttp", "tenacity"):
        if importlib.util.find_spec(package) is None:
            raise LMTPError(
                f"lm-evaluation-harness is not installed ({package} is missing): run pip install '.[eval]' in the checkout, "
                "or pip install 'lm_eval[api]>=0.4.13,<0.5'."
            )


def ask(model: LM, problems: Mapping[Benchmark, Sequence[Row]], max_new_tokens: int) -> list[Answer]:
    """Let a model answer all rows, and score the answers.

    Args:
        model: A model of lm_eval.
        problems: Rows of each benchmark.
        max_new_tokens: Longest answer, in tokens.

    Returns:
        The answers in the order of the rows.

    Raises:
        LMTPError: A server fails, or lm_eval does not score every row.
    """
    from aiohttp import ClientError
    from lm_eval import evaluate

    scorers = {benchmark.name: _Scorer(benchmark, rows) for benchmark, rows in problems.items()}
    tasks = {name: _task(scorer, max_new_tokens) for name, scorer in scorers.items()}
    try:
        results = evaluate(
            model,
            tasks,
            bootstrap_iters=0,
            apply_chat_template=True,
            # The command has asked the user, and code runs in our sandbox.
            confirm_run_unsafe_code=True,
        )
    except (ClientError, TimeoutError) as error:
        raise LMTPError(
            f"The server refuses a request or has stopped ({first_line(error)}): correct the cause, which lm_eval's lines "
            "above tell, and run the command again."
        ) from error
    answers = []
    for benchmark, rows in problems.items():
        texts: dict[int, str] = {}
        scores: dict[int, dict[str, bool]] = {}
        reasons = scorers[benchmark.name].reasons
        for sample in results["samples"][benchmark.name]:
            number = sample["doc_id"]
            texts[number] = sample["resps"][0][0]
            name = _GSM8K_SCORES.get(sample["filter"], benchmark.name)
            scores.setdefault(number, {})[name] = bool(sample[sample["metrics"][0]])
        if sorted(texts) != list(range(len(rows))):
            raise LMTPError(
                f"lm_eval scored {len(texts)} of {len(rows)} rows of {benchmark.name}: report this as a bug."
            )
        answers += [
            Answer(benchmark.name, row["id"], texts[number], scores[number], reasons.get(number, ""))
            for number, row in enumerate(rows)
        ]
    return answers


class _Scorer:
    """Scores the answers to a benchmark's rows.

    Attributes:
        reasons: Number of a row -> why its answer is wrong, where the scorer knows.
    """

    def __init__(self, benchmark: Benchmark, rows: Sequence[Row]):
        self.benchmark = benchmark
        self.rows = rows
        self.reasons: dict[int, str] = {}

    def configuration(self) -> dict[str, Any]:
        """Return the part of a task's configuration that scores."""
        name = self.benchmark.name
        if name == "gsm8k":
            return _GSM8K_SCORING
        metric, score = {"math500": ("exact_match", self._math_match)}.get(name, ("pass@1", self._pass_at_1))
        return {
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
            "process_results": lambda document, results: {metric: int(score(document["number"], results[0]))},
        }

    def target(self, number: int) -> str:
        """Return the right answer, or the tests."""
        row = self.rows[number]
        return self.benchmark.program(row, "") if self.benchmark.program else row["answer"]

    def _pass_at_1(self, number: int, answer: str) -> bool:
        outcome = run_program(self.benchmark.program(self.rows[number], code_block(answer)))
        self.reasons[number] = outcome.reason
        return outcome.passed

    def _math_match(self, number: int, answer: str) -> bool:
        """Compare the answer's last box with the reference by lm_eval's equivalence of LaTeX strings."""
        from lm_eval.tasks.hendrycks_math import utils

        boxed = utils.last_boxed_only_string(answer)
        try:
            written = utils.remove_boxed(boxed) if boxed else None
        except AssertionError:  # \fbox, or words between the command and its brace
            written = None
        self.reasons[number] = "no \\boxed answer" if written is None else ""
        return utils.is_equiv(written, self.rows[number]["answer"])


def _task(scorer: _Scorer, max_new_tokens: int) -> Task:
    """Return a benchmark as a task of lm_eval: zero-shot, greedy."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    # Prompts alone travel through lm_eval, which would make a table of all fields of all rows.
    documents = [{"number": number, "prompt": scorer.benchmark.prompt(row)} for number, row in enumerate(scorer.rows)]
    config = {
        "task": scorer.benchmark.name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
        "test_split": "test",
        "output_type": "generate_until",
        "num_fewshot": 0,
        "doc_to_text": lambda document: document["prompt"],
        "doc_to_target": lambda document: scorer.target(document["number"]),
        "generation_kwargs": {
            "do_sample": False,
            "until": [],
            "max_gen_toks": max_new_tokens,
            # vLLM and SGLang take the penalty from the model's generation_config.json otherwise.
            "repetition_penalty": 1.0,
        },
        "unsafe_code": scorer.benchmark.runs_code,
        **scorer.configuration(),
    }
    with _errors_only():
        return ConfigurableTask(config=config)


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Hide lm_eval's advice about command-line options that this command does not have."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
