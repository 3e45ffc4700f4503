"""One figure of all heads' losses and accuracies, beside upstream's ``training_loss.png``."""

import json
import os

from ..evaluation.plots import draw_head_curves
from .trainer_log import head_metrics


FIGURE = "training_heads.png"


def plot_head_metrics(output_dir: str) -> None:
    """Draw the per-head curves that ``trainer_state.json`` in ``output_dir`` holds."""
    with open(os.path.join(output_dir, "trainer_state.json"), encoding="utf-8") as file:
        history = json.load(file)["log_history"]
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in head_metrics(entry).items():
            curves.setdefault(name, []).append((entry["step"], value))
    if curves:
        path = os.path.join(output_dir, FIGURE)
        draw_head_curves(curves, path)
        print("Figure saved at:", path)
