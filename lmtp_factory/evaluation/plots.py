"""Figures of training curves, scores and benchmarks. They need no display."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import atomic_write


if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .bench import ArmResult
    from .scoring import HeadScores


def save_png(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure as a PNG file, completely or not at all.

    Raises:
        OSError: Writing failed, see `files.atomic_write`.
    """
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=100)


@dataclass(frozen=True)
class TrainingCurve:
    """One metric over the steps of a training run.

    Attributes:
        quantity: What the values are. Curves of the same quantity share a panel, which has it as its title.
        head: Number of the head, 0 for the LM head; None if the metric is of all heads together.
        is_evaluation: Whether the values come from evaluation; otherwise from training.
        points: (step, value) pairs.
    """

    quantity: str
    head: int | None
    is_evaluation: bool
    points: Sequence[tuple[int, float]]


def draw_training(curves: Sequence[TrainingCurve], path: str) -> None:
    """Write a PNG file with one panel for each quantity, side by side."""
    titles = quantities_of(curves)
    figure = Figure(figsize=(5 * len(titles), 4), layout="constrained")
    FigureCanvasAgg(figure)
    draw_curves(curves, dict(zip(titles, figure.subplots(1, len(titles), squeeze=False)[0])))
    save_png(figure, path)


def quantities_of(curves: Sequence[TrainingCurve]) -> list[str]:
    """Return the quantities of the curves, each once, in the order of the curves."""
    return list(dict.fromkeys(curve.quantity for curve in curves))


def draw_curves(curves: Sequence[TrainingCurve], panels: Mapping[str, "Axes"]) -> None:
    """Draw each curve on the panel of its quantity, one colour a head; evaluation dashed with dots."""
    for curve in curves:
        name = "all heads" if curve.head is None else f"head {curve.head}"
        panels[curve.quantity].plot(
            *zip(*curve.points),
            color="black" if curve.head is None else f"C{curve.head}",
            linestyle="--" if curve.is_evaluation else "-",
            marker="o" if curve.is_evaluation else None,
            label=f"{name}{' (evaluation)' if curve.is_evaluation else ''}",
        )
    for title, panel in panels.items():
        panel.set(xlabel="step", ylabel=title)
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend()


def draw_head_bars(scores: Mapping[str, "HeadScores"], path: str | os.PathLike) -> None:
    """Draw loss and top-1 accuracy of every head as bars, one colour per model; `path` is the PNG file to write."""
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
    save_png(figure, path)


def draw_bench(rows: Sequence["ArmResult"], path: str | os.PathLike) -> None:
    """Draw tokens per second as bars, labelled with speed-up and tau; `path` is the PNG file to write."""
    figure = Figure(figsize=(9, 0.45 * len(rows) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    colours = ["0.6" if not row.is_ours else "C1" if not any(row.acceptance) else "C0" for row in rows]
    bars = panel.barh([row.name for row in rows], [row.tokens_per_second for row in rows], color=colours)
    labels = [f"{row.over_stock:.2f}x stock, tau {row.tau:.2f}" for row in rows]
    panel.bar_label(bars, labels, padding=4, fontsize=8)
    panel.invert_yaxis()
    panel.set(xlabel="tokens/s", xlim=(0, 1.3 * max(row.tokens_per_second for row in rows)))
    panel.grid(axis="x", alpha=0.3)
    save_png(figure, path)
