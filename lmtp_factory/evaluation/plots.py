"""Figures, drawn without a display."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..decoding.tree import best_first_paths


if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..decoding.tree_config import TreeConfig
    from ..tuning.tree_search import Option
    from .bench import ArmResult
    from .scoring import HeadScores


@dataclass(frozen=True)
class HeadCurve:
    """One metric of one head over the steps of a training run.

    Attributes:
        head: Number of the head; 0 is the LM head.
        is_accuracy: Whether the values are top-1 accuracies; otherwise losses.
        is_evaluation: Whether they come from evaluation; otherwise from training.
        points: (step, value) pairs.
    """

    head: int
    is_accuracy: bool
    is_evaluation: bool
    points: Sequence[tuple[int, float]]


def draw_head_curves(curves: Sequence[HeadCurve], path: str) -> None:
    """Write a PNG file with losses on the left and top-1 accuracies on the right."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    draw_curves(curves, figure.subplots(1, 2))
    figure.savefig(path, dpi=100)


def draw_curves(curves: Sequence[HeadCurve], panels: Sequence["Axes"]) -> None:
    """Draw losses on the first panel and accuracies on the second, one colour a head; evaluation dashed with dots."""
    for curve in curves:
        panels[int(curve.is_accuracy)].plot(
            *zip(*curve.points),
            color=f"C{curve.head}",
            linestyle="--" if curve.is_evaluation else "-",
            marker="o" if curve.is_evaluation else None,
            label=f"head {curve.head}{' (evaluation)' if curve.is_evaluation else ''}",
        )
    for panel, title in zip(panels, ("loss", "top-1 accuracy")):
        panel.set(xlabel="step", ylabel=title)
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend()


def draw_head_bars(scores: Mapping[str, "HeadScores"], path: str | os.PathLike) -> None:
    """Loss and top-1 accuracy of every head as bars, a colour a model; ``path`` is the PNG file to write."""
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


def draw_tree(
    plan: "TreeConfig",
    accuracies: Sequence[Sequence[float]],
    seconds: Mapping[int, float],
    options: Sequence["Option"],
    path: str | os.PathLike,
) -> None:
    """The tree, the device's cost curve and what each option promises; ``path`` is the PNG file to write.

    A dynamic tree has another shape in each step; the one drawn is the best on average.
    """
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    tree, curve, choice = figure.subplots(1, 3)
    paths = plan.fixed_paths() or best_first_paths(accuracies, plan.nodes)
    _draw_paths(tree, paths)
    what = "on average" if plan.kind == "dynamic" and plan.nodes > 1 else plan.kind
    tree.set(title=f"the tree, {what}: {len(paths)} nodes", ylabel="tokens after the root", xticks=[])

    curve.plot(list(seconds), [1e3 * value for value in seconds.values()], marker="o")
    curve.set_xscale("log", base=2)
    curve.set(title="a forward on this device", xlabel="tokens verified", ylabel="ms", ylim=(0, None))
    curve.set_xticks(list(seconds), list(map(str, seconds)))
    curve.grid(alpha=0.3)

    for kind in dict.fromkeys(option.kind for option in options):
        points = [(option.nodes, option.tokens_per_second) for option in options if option.kind == kind]
        choice.plot(*zip(*points), marker="o", label=kind)
    choice.set_xscale("log", base=2)
    choice.set(title="expected", xlabel="nodes, the root counted", ylabel="tokens/s", ylim=(0, None))
    choice.grid(alpha=0.3)
    choice.legend()
    figure.savefig(path, dpi=100)


def _draw_paths(panel: "Axes", paths: Sequence[Sequence[int]]) -> None:
    """Nodes in columns by level, each level from its best path at the top to its least."""
    levels: dict[int, list[tuple[int, ...]]] = {}
    for path in sorted(map(tuple, paths)):
        levels.setdefault(len(path), []).append(path)
    places = {
        path: (-(index + 1) / (len(row) + 1), -level) for level, row in levels.items() for index, path in enumerate(row)
    }
    for path, (across, down) in places.items():
        if path:
            above = places[path[:-1]]
            panel.plot([-above[0], -across], [above[1], down], color="0.6", linewidth=0.8, zorder=1)
    panel.scatter([-x for x, _ in places.values()], [y for _, y in places.values()], s=260, color="C0", zorder=2)
    for path, (across, down) in places.items():
        label = str(path[-1] + 1) if path else "root"
        panel.annotate(label, (-across, down), ha="center", va="center", fontsize=7, color="white", zorder=3)
    panel.set_yticks([-level for level in levels], list(map(str, levels)))


def draw_bench(rows: Sequence["ArmResult"], path: str | os.PathLike) -> None:
    """Tokens per second as bars, tau beside them; ``path`` is the PNG file to write."""
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
