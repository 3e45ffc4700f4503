"""Curves of all heads' losses and accuracies, from Trainer logs."""

import json
import os
from collections.abc import Iterable
from typing import Any

from ...evaluation.plots import HeadCurve, draw_head_curves
from .head_metrics import ACCURACY, HeadMetric, per_head


FIGURE = "training_heads.png"


def head_curves(entries: Iterable[dict[str, Any]], step_key: str) -> list[HeadCurve]:
    """One curve for every per-head metric in a log.

    Args:
        entries: Entries of the log.
        step_key: Name under which an entry holds its step.
    """
    points: dict[HeadMetric, list[tuple[int, float]]] = {}
    for entry in entries:
        for metric, value in per_head(entry).items():
            points.setdefault(metric, []).append((entry[step_key], value))
    return [
        HeadCurve(metric.head, metric.quantity == ACCURACY, bool(metric.prefix), values)
        for metric, values in points.items()
    ]


def plot_head_metrics(output_dir: str) -> None:
    """Draw the per-head curves of `trainer_state.json` beside upstream's `training_loss.png`."""
    with open(os.path.join(output_dir, "trainer_state.json"), encoding="utf-8") as file:
        curves = head_curves(json.load(file)["log_history"], "step")
    if curves:
        path = os.path.join(output_dir, FIGURE)
        draw_head_curves(curves, path)
        print("Figure saved at:", path)
