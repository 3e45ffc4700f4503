"""Curves of the heads' losses, accuracies and tau, from Trainer logs."""

import json
import os
from collections.abc import Iterable
from typing import Any

from ...evaluation.plots import TrainingCurve, draw_training
from .head_metrics import ACCURACY, LOSS, TAU, HeadMetric, heads_metrics


FIGURE = "training_heads.png"
_TITLES = {LOSS: "loss", ACCURACY: "top-1 accuracy", TAU: "tau of a chain (tokens per forward)"}


def head_curves(entries: Iterable[dict[str, Any]], step_key: str) -> list[TrainingCurve]:
    """One curve for every metric of the heads in a log, quantity by quantity.

    Args:
        entries: Entries of the log.
        step_key: Name under which an entry holds its step.
    """
    points: dict[HeadMetric, list[tuple[int, float]]] = {}
    for entry in entries:
        for metric, value in heads_metrics(entry).items():
            points.setdefault(metric, []).append((entry[step_key], value))
    return [
        TrainingCurve(title, metric.head, bool(metric.prefix), values)
        for quantity, title in _TITLES.items()
        for metric, values in points.items()
        if metric.quantity == quantity
    ]


def plot_head_metrics(output_dir: str) -> None:
    """Draw the curves of the heads of `trainer_state.json` beside upstream's `training_loss.png`."""
    with open(os.path.join(output_dir, "trainer_state.json"), encoding="utf-8") as file:
        curves = head_curves(json.load(file)["log_history"], "step")
    if curves:
        path = os.path.join(output_dir, FIGURE)
        draw_training(curves, path)
        print("Figure saved at:", path)
