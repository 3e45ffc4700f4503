"""Draws per-head curves below upstream's loss while the Board trains."""

import functools
from types import ModuleType
from typing import Any

from ....evaluation.plots import draw_curves
from ... import hooks
from ...training.plots import head_curves


# Figure size in inches: the viewer is a narrow column, so a smaller figure has larger letters. The viewer's label covers
# the top of the figure, so the plots end below it.
_SIZE, _BELOW_LABEL = (5, 11), 0.95


def extend(control: ModuleType) -> None:
    """Wrap `gen_loss_plot`: the figure has two more panels if the log has per-head metrics."""
    upstream = hooks.expect(control, "gen_loss_plot", "trainer_log")

    @functools.wraps(upstream)
    def gen_loss_plot(trainer_log: list[dict[str, Any]]):
        figure = upstream(trainer_log)
        if curves := head_curves(trainer_log, "current_steps"):
            rows = figure.add_gridspec(3, 1)
            figure.axes[0].set_subplotspec(rows[0])
            draw_curves(curves, [figure.add_subplot(rows[1]), figure.add_subplot(rows[2])])
            figure.set_size_inches(_SIZE)
            figure.set_layout_engine("constrained", rect=(0, 0, 1, _BELOW_LABEL))
        return figure

    control.gen_loss_plot = gen_loss_plot
