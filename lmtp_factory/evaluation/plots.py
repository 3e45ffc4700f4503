"""Figures, drawn without a display."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .bench import ArmResult
    from .scoring import HeadScores


def draw_head_curves(curves: Mapping[str, Sequence[tuple[int, float]]], path: str) -> None:
    """Losses on the left, top-1 accuracies on the right, a colour a head; evaluation dashed with dots.

    Args:
        curves: metric name (`loss_head_1`, `eval_acc_head_2`, ...) to (step, value) points.
        path: of the PNG file to write.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    draw_curves(curves, figure.subplots(1, 2))
    figure.savefig(path, dpi=100)


def draw_curves(curves: Mapping[str, Sequence[tuple[int, float]]], panels: Sequence["Axes"]) -> None:
    """The same on two panels, the first for losses and the second for accuracies."""
    for name, points in curves.items():
        head = int(name.rsplit("_", 1)[1])
        is_accuracy, is_eval = "acc_head" in name, name.startswith("eval_")
        panels[int(is_accuracy)].plot(
            *zip(*points),
            color=f"C{head}",
            linestyle="--" if is_eval else "-",
            marker="o" if is_eval else None,
            label=f"head {head}{' (evaluation)' if is_eval else ''}",
        )
    for panel, title in zip(panels, ("loss", "top-1 accuracy")):
        panel.set(xlabel="step", ylabel=title)
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend()


def draw_head_bars(scores: Mapping[str, "HeadScores"], path: str | os.PathLike) -> None:
    """Loss and top-1 accuracy of every head as bars, a colour a model; `path` is the PNG file to write."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    width = 0.8 / len(scores)
    for index, (label, score) in enumerate(scores.items()):
        places = [head + (index - (len(scores) - 1) / 2) * width for head in range(len(score.offsets))]
        panels[0].bar(places, score.losses, width, label=label)
        panels[1].bar(places, [100 * accuracy for accuracy in score.accuracies], width, label=label)
    offsets = next(iter(scores.values())).offsets
    for panel, title in zip(panels, ("loss on held-out text (nats)", "top-1 accuracy on held-out text (%)")):
        panel.set(
            title=title, xlabel="tokens ahead", xticks=range(len(offsets)), xticklabels=[f"+{o}" for o in offsets]
        )
        panel.grid(axis="y", alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=100)


def draw_bench(rows: Sequence["ArmResult"], path: str | os.PathLike) -> None:
    """Tokens per second as bars, tau beside them; `path` is the PNG file to write."""
    figure = Figure(figsize=(9, 0.45 * len(rows) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    colours = ["0.6" if row.verify_share is None else "C1" if not any(row.acceptance) else "C0" for row in rows]
    bars = panel.barh([row.name for row in rows], [row.tokens_per_second for row in rows], color=colours)
    labels = [f"{row.over_stock:.2f}x stock, tau {row.tau:.2f}" for row in rows]
    panel.bar_label(bars, labels, padding=4, fontsize=8)
    panel.invert_yaxis()
    panel.set(xlabel="tokens/s", xlim=(0, 1.3 * max(row.tokens_per_second for row in rows)))
    panel.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=100)
