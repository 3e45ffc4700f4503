"""Scores of answers: share of right ones with a 95 % interval, table, JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...files import atomic_write


RESULT_FILE, ANSWERS_FILE = "quality.json", "answers.jsonl"
# Two-sided 95 % quantile of the normal distribution.
_Z = 1.959963984540054


@dataclass(frozen=True)
class Answer:
    """One answer of a model.

    Attributes:
        task: Name of the benchmark.
        id: Id of the row.
        text: What the model wrote.
        scores: Name of a score -> whether the answer is right by it.
        reason: Why it is wrong, where the scorer knows.
    """

    task: str
    id: str
    text: str
    scores: Mapping[str, bool]
    reason: str = ""


@dataclass(frozen=True)
class Score:
    """Right answers among all."""

    right: int
    answers: int

    @property
    def share(self) -> float:
        """Share of right answers."""
        return self.right / self.answers

    @property
    def interval(self) -> tuple[float, float]:
        """Bounds of the share; see `wilson_interval`."""
        return wilson_interval(self.right, self.answers)

    def to_dict(self) -> dict[str, Any]:
        """Return counts, share and interval."""
        return {"right": self.right, "answers": self.answers, "score": self.share, "interval_95": list(self.interval)}


@dataclass(frozen=True)
class ModelResult:
    """What one model scored.

    Attributes:
        model: Directory, hub id or name on a server.
        answers: Its answers, in the order of the rows.
        seconds: Time to answer and to score.
    """

    model: str
    answers: Sequence[Answer] = field(repr=False)
    seconds: float

    @property
    def scores(self) -> dict[str, Score]:
        """Score of each column."""
        columns: dict[str, list[bool]] = {}
        for answer in self.answers:
            for name, right in answer.scores.items():
                columns.setdefault(name, []).append(right)
        return {name: Score(sum(rights), len(rights)) for name, rights in columns.items()}

    @property
    def empty(self) -> int:
        """Number of answers without text. A server sends them when all of an answer was reasoning."""
        return sum(not answer.text.strip() for answer in self.answers)


def wilson_interval(right: int, answers: int) -> tuple[float, float]:
    """Return the bounds of Wilson's 95 % interval of a share (Wilson 1927).

    It stays inside 0 and 1 and is wider than nothing at 0 and at 1, where the normal approximation has no width.

    Args:
        right: Right answers.
        answers: All answers, at least one.
    """
    share, z2 = right / answers, _Z**2
    middle = (share + z2 / (2 * answers)) / (1 + z2 / answers)
    half = _Z / (1 + z2 / answers) * math.sqrt(share * (1 - share) / answers + z2 / (4 * answers**2))
    return (0.0 if right == 0 else middle - half, 1.0 if right == answers else middle + half)


def differing_answers(first: ModelResult, other: ModelResult) -> int:
    """Return how many answers of two models to the same rows are different texts."""
    return sum(one.text != two.text for one, two in zip(first.answers, other.answers, strict=True))


def table(results: Mapping[str, ModelResult]) -> str:
    """Format the scores in percent with their intervals, one line per model."""
    columns = list(next(iter(results.values())).scores)
    width = max(len(label) for label in results)
    cells = {label: [_cell(result.scores[name]) for name in columns] for label, result in results.items()}
    widths = [max(len(name), *(len(row[i]) for row in cells.values())) for i, name in enumerate(columns)]
    lines = ["  ".join([" " * width, *(name.rjust(w) for name, w in zip(columns, widths))])]
    for label, row in cells.items():
        lines.append("  ".join([label.ljust(width), *(cell.rjust(w) for cell, w in zip(row, widths))]))
    return "\n".join(line.rstrip() for line in lines)


def remarks(results: Mapping[str, ModelResult]) -> str:
    """Say how long each model took, what it left empty, and how many of its answers differ from the first model's."""
    (base, first), *others = results.items()
    lines = []
    for label, result in results.items():
        empty = f"; {result.empty} answers are empty" if result.empty else ""
        lines.append(f"{label}: {len(result.answers)} answers in {result.seconds:.0f} seconds{empty}.")
    for label, result in others:
        differing = differing_answers(first, result)
        what = f"{differing} of {len(first.answers)} answers differ" if differing else "all answers are equal"
        lines.append(f"{label} and {base}: {what}.")
    return "\n".join(lines)


def write_results(facts: Mapping[str, Any], results: Mapping[str, ModelResult], output_dir: Path) -> None:
    """Write `quality.json` (facts, scores) and `answers.jsonl` (every answer) to a directory."""
    output_dir.mkdir(parents=True, exist_ok=True)
    first = next(iter(results.values()))
    models = {
        label: {
            "model": result.model,
            "seconds": round(result.seconds, 1),
            "scores": {name: score.to_dict() for name, score in result.scores.items()},
            "empty_answers": result.empty,
            "answers_unlike_first": differing_answers(first, result),
        }
        for label, result in results.items()
    }
    with atomic_write(output_dir / RESULT_FILE) as file:
        json.dump({**facts, "models": models}, file, indent=1)
    with atomic_write(output_dir / ANSWERS_FILE) as file:
        for label, result in results.items():
            for answer in result.answers:
                file.write(json.dumps({"model": label, **vars(answer)}) + "\n")


def _cell(score: Score) -> str:
    low, high = score.interval
    return f"{100 * score.share:.1f} ({100 * low:.1f}-{100 * high:.1f})"
