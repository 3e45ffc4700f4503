"""How well each head predicts held-out text."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..distill.rows import PROMPT_COLUMN, RESPONSE_COLUMN, parse_ids
from ..errors import LMTPError
from ..modeling.losses.targets import IGNORE_INDEX
from ..modeling.model import base_of
from ..modeling.objective import Objective


Row = tuple[list[int], list[int]]  # prompt ids, output ids


@dataclass(frozen=True)
class HeadScores:
    """Scores over all valid targets; index 0 is the LM head.

    Attributes:
        offsets: how many tokens ahead each head predicts.
        losses: mean cross-entropy in nats.
        accuracies: top-1, between 0 and 1.
        targets: how many targets were scored.
    """

    offsets: tuple[int, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    targets: tuple[int, ...]

    @property
    def perplexity(self) -> float:
        """Of the LM head."""
        return math.exp(self.losses[0])

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self) | {"perplexity": self.perplexity}


def read_rows(path: str | Path, limit: int | None = None) -> list[Row]:
    """Rows of token ids that ``lmtp-cli distill`` wrote.

    Raises:
        LMTPError: a line is no such row; the sentence names it.
    """
    rows: list[Row] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if limit is not None and len(rows) == limit:
                break
            try:
                row = json.loads(line)
                rows.append((parse_ids(row[PROMPT_COLUMN]), parse_ids(row[RESPONSE_COLUMN])))
            except (ValueError, KeyError, TypeError) as error:
                raise LMTPError(f"{path} line {number} is no row of lmtp-cli distill ({error}).") from None
    if not rows:
        raise LMTPError(f"{path} holds no rows: make some with lmtp-cli distill.")
    return rows


@torch.no_grad()
def score_heads(model: nn.Module, rows: Sequence[Row], batch_size: int = 4, label: str = "scoring") -> HeadScores:
    """Loss and accuracy of every head of a model with leap heads on the rows' outputs (prompts are masked)."""
    base = base_of(model)
    config = base.leap_heads.config
    sums = torch.zeros(3, len(config.offsets), dtype=torch.float64)
    objective, was_training = Objective.of_evaluation(config.num_heads), model.training
    model.eval()
    try:
        ordered = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
        for start in tqdm(range(0, len(ordered), batch_size), desc=label, leave=False):
            batch = _batch(ordered[start : start + batch_size], base.device)
            outputs = base.leap_loss(objective=objective, **batch)
            sums += torch.stack([sum_.cpu().double() for sum_ in (outputs.loss_sums, outputs.hits, outputs.counts)])
    finally:
        model.train(was_training)
    losses, accuracies = (sums[:2] / sums[2].clamp(min=1)).tolist()
    return HeadScores(config.offsets, tuple(losses), tuple(accuracies), tuple(int(n) for n in sums[2]))


def _batch(rows: Sequence[Row], device: torch.device) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(prompt + output) for prompt, output in rows]
    labels = [torch.tensor([IGNORE_INDEX] * len(prompt) + output) for prompt, output in rows]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}
