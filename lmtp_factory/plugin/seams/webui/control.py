"""Draws the heads' curves below upstream's loss while the Board trains."""

import functools
from types import ModuleType
from typing import Any

from ....evaluation.plots import draw_curves, quantities_of
from ... import hooks
from ...training.plots import head_curves


# Inches of the figure and of each panel: the viewer is a narrow column, so a smaller figure has larger letters. The viewer's
# label covers the top of the figure, so the plots end below it.
_WIDTH, _PANEL_HEIGHT, _BELOW_LABEL = 5, 3.7, 0.95


def extend(control: ModuleType) -> None:
    """Wrap `gen_loss_plot`: the figure has a panel more for each kind of metric that the heads have in the log."""
    upstream = hooks.expect(control, "gen_loss_plot", "trainer_log")

    @functools.wraps(upstream)
    def gen_loss_plot(trainer_log: list[dict[str, Any]]):
        figure = upstream(trainer_log)
        if curves := head_curves(trainer_log, "current_steps"):
            titles = quantities_of(curves)
            rows = figure.add_gridspec(1 + len(titles), 1)
            figure.axes[0].set_subplotspec(rows[0])
            draw_curves(curves, {title: figure.add_subplot(rows[row]) for row, title in enumerate(titles, 1)})
            figure.set_size_inches(_WIDTH, _PANEL_HEIGHT * (1 + len(titles)))
            figure.set_layout_engine("constrained", rect=(0, 0, 1, _BELOW_LABEL))
        return figure

    control.gen_loss_plot = gen_loss_plot
