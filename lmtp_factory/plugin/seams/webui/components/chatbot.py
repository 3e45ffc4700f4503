"""Adds the decoding switch to the Chat tab."""

import functools
from types import ModuleType
from typing import TYPE_CHECKING

from .....options import STRATEGIES
from .... import hooks
from ....webui.wiring import add_input, place_before


if TYPE_CHECKING:
    from gradio.components import Component


def extend(chatbot: ModuleType) -> None:
    """Wrap `create_chat_box`: the switch is above upstream's generation settings."""
    upstream = hooks.expect(chatbot, "create_chat_box", "engine")

    @functools.wraps(upstream)
    def create_chat_box(engine, *args, **kwargs) -> tuple["Component", "Component", dict[str, "Component"]]:
        import gradio as gr

        box, messages, elements = upstream(engine, *args, **kwargs)
        switch = gr.Dropdown(choices=list(STRATEGIES), value=STRATEGIES[0])
        try:
            add_input(engine.chatter.stream, switch)
            place_before(switch, elements["max_new_tokens"])
        except Exception as error:  # the layout of another gradio version
            switch.visible = False
            hooks.fail(chatbot.__name__, error)
        return box, messages, elements | {"lmtp_decode": switch}

    chatbot.create_chat_box = create_chat_box
