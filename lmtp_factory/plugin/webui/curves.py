"""Per-head curves below upstream's loss while the Board trains (``llamafactory.webui.control``)."""

import functools
from types import ModuleType
from typing import Any

from ...evaluation.plots import draw_curves
from .. import hooks
from ..trainer_log import head_metrics


# Inches; the viewer is a narrow column, so a smaller figure means larger letters. Its label lies on the figure's top.
_SIZE, _BELOW_LABEL = (5, 11), 0.95


def extend_control(control: ModuleType) -> None:
    """Let the loss viewer show the heads too, where the log has some."""
    upstream = hooks.expect(control, "gen_loss_plot", "trainer_log")

    @functools.wraps(upstream)
    def gen_loss_plot(trainer_log: list[dict[str, Any]]):
        figure = upstream(trainer_log)
        curves: dict[str, list[tuple[int, float]]] = {}
        for entry in trainer_log:
            for name, value in head_metrics(entry).items():
                curves.setdefault(name, []).append((entry["current_steps"], value))
        if curves:
            rows = figure.add_gridspec(3, 1)
            figure.axes[0].set_subplotspec(rows[0])
            draw_curves(curves, [figure.add_subplot(rows[1]), figure.add_subplot(rows[2])])
            figure.set_size_inches(_SIZE)
            figure.set_layout_engine("constrained", rect=(0, 0, 1, _BELOW_LABEL))
        return figure

    control.gen_loss_plot = gen_loss_plot
