"""Adds the style of the statistics below an answer."""

from types import ModuleType

from ... import hooks
from ...webui.answer import STYLE


def extend(css: ModuleType) -> None:
    """Append to upstream's `CSS`."""
    css.CSS = hooks.expect(css, "CSS") + STYLE
