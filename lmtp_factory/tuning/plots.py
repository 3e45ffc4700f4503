"""Figure of the chosen draft tree. Needs no display."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..decoding.tree import best_first_paths
from ..evaluation.plots import save_png


if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..decoding.tree_config import TreeConfig
    from .tree_search import Option


def draw_tree(
    tree_config: "TreeConfig",
    accuracies: Sequence[Sequence[float]],
    seconds: Mapping[int, float],
    options: Sequence["Option"],
    path: str | os.PathLike,
) -> None:
    """Draw the tree, the device's cost curve and the expected speed of each option.

    A dynamic tree has another shape in each step. The figure shows the tree that is best on average.

    Args:
        tree_config: The chosen tree.
        accuracies: For each level the accuracy of the candidate of each rank.
        seconds: Maps numbers of tokens to the duration of a forward.
        options: The options that were compared.
        path: PNG file to write.
    """
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    tree, curve, choice = figure.subplots(1, 3)
    paths = tree_config.fixed_paths() or best_first_paths(accuracies, tree_config.nodes)
    _draw_paths(tree, paths)
    what = "on average" if tree_config.kind == "dynamic" and tree_config.nodes > 1 else tree_config.kind
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
    save_png(figure, path)


def _draw_paths(panel: "Axes", paths: Sequence[Sequence[int]]) -> None:
    """Draw one row of nodes per level, the root at the top, better paths further left."""
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
