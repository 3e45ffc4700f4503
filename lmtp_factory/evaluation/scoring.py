"""Loss and accuracy of each head on held-out text."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..decoding.cpu_prepacked import prepacked_if_possible
from ..distill.rows import PROMPT_COLUMN, RESPONSE_COLUMN, parse_ids
from ..errors import LMTPError
from ..modeling.losses.targets import IGNORE_INDEX
from ..modeling.model import base_of
from ..modeling.objective import Objective


Row = tuple[list[int], list[int]]  # prompt ids, output ids


@dataclass(frozen=True)
class HeadScores:
    """Scores over all valid targets. Index 0 is the LM head.

    Attributes:
        offsets: Offset of each head.
        losses: Mean cross-entropy of each head, in nats.
        accuracies: Top-1 accuracy of each head, between 0 and 1.
        targets: Number of valid targets of each head. Those outside a draft vocabulary count as misses.
        scored: Number of targets that the loss is averaged over: those in the draft vocabulary.
    """

    offsets: tuple[int, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    targets: tuple[int, ...]
    scored: tuple[int, ...]

    @property
    def perplexity(self) -> float:
        """Perplexity of the LM head."""
        return math.exp(self.losses[0])

    def to_dict(self) -> dict:
        """Return the scores as plain values, for JSON."""
        return asdict(self) | {"perplexity": self.perplexity}


def read_rows(path: str | Path, limit: int | None = None) -> list[Row]:
    """Read rows of token ids that `lmtp-cli distill` wrote.

    Args:
        path: JSONL file.
        limit: Number of rows; None for all.

    Raises:
        LMTPError: A line is not such a row, or the file has no rows.
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
                raise LMTPError(
                    f"{path} line {number} is no row of lmtp-cli distill ({error}): make the file with that command."
                ) from None
    if not rows:
        raise LMTPError(f"{path} has no rows: write some with lmtp-cli distill.")
    return rows


@torch.no_grad()
def score_heads(model: nn.Module, rows: Sequence[Row], batch_size: int = 4, label: str = "scoring") -> HeadScores:
    """Compute loss and accuracy of every head on the rows' outputs; prompts are masked.

    Args:
        model: A model with leap heads.
        rows: Token ids of prompts and outputs.
        batch_size: Rows per forward.
        label: Title of the progress bar.
    """
    base = base_of(model)
    config = base.leap_heads.config
    sums = torch.zeros(4, len(config.offsets), dtype=torch.float64)  # loss sums, hits, counts, outside
    objective, was_training = Objective.of_evaluation(config.num_heads), model.training
    model.eval()
    try:
        ordered = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
        with prepacked_if_possible(base.base_model):
            for start in tqdm(range(0, len(ordered), batch_size), desc=label, leave=False):
                batch = _batch(ordered[start : start + batch_size], base.device)
                outputs = base.leap_loss(objective=objective, **batch)
                parts = (outputs.loss_sums, outputs.hits, outputs.counts, outputs.outside)
                sums += torch.stack([part.cpu().double() for part in parts])
    finally:
        model.train(was_training)
    targets = sums[2] + sums[3]
    losses, accuracies = sums[0] / sums[2].clamp(min=1), sums[1] / targets.clamp(min=1)
    parts = (losses, accuracies, targets.long(), sums[2].long())
    return HeadScores(config.offsets, *(tuple(part.tolist()) for part in parts))


def _batch(rows: Sequence[Row], device: torch.device) -> dict[str, torch.Tensor]:
    """Pad rows on the right to (rows, longest row) tensors."""
    ids = [torch.tensor(prompt + output) for prompt, output in rows]
    labels = [torch.tensor([IGNORE_INDEX] * len(prompt) + output) for prompt, output in rows]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}
