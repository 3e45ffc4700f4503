"""Starts log lines on a line of their own while the `chat` command prints answers."""

import functools
from types import ModuleType

from ... import hooks
from ...chat import prints_answers


def extend(module: ModuleType) -> None:
    """Wrap `run_chat`."""
    upstream = hooks.expect(module, "run_chat")

    @functools.wraps(upstream)
    def run_chat():
        prints_answers.set()
        try:
            upstream()
        finally:
            prints_answers.clear()

    module.run_chat = run_chat
