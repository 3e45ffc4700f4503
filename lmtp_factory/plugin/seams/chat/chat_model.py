"""Tells the parser that a chat starts, and starts log lines on a line of their own while the `chat` command prints."""

import functools
from types import ModuleType

from ... import hooks
from ...chat import prints_answers, starts_chat


def extend(module: ModuleType) -> None:
    """Wrap `run_chat`, and `ChatModel.__init__`, which parses the arguments of chat, api and web UI."""
    upstream = hooks.expect(module, "run_chat")
    chat_model = hooks.expect(module, "ChatModel")
    initialize = hooks.expect(chat_model, "__init__", "args")

    @functools.wraps(initialize)
    def initialize_chat(self, *args, **kwargs):
        before = starts_chat.set(True)
        try:
            initialize(self, *args, **kwargs)
        finally:
            starts_chat.reset(before)

    @functools.wraps(upstream)
    def run_chat():
        prints_answers.set()
        try:
            upstream()
        finally:
            prints_answers.clear()

    module.run_chat, chat_model.__init__ = run_chat, initialize_chat
