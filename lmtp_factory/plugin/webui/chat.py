"""The Chat tab: heads that are found by themselves, a switch, and how fast each answer was (``llamafactory.webui``)."""

import copy
import functools
from types import ModuleType
from typing import TYPE_CHECKING

from ...errors import LMTPError
from ...modeling import heads_of
from ...options import STRATEGIES
from .. import hooks
from ..chat import Wish
from .answer import summary
from .export import with_key
from .runs import holds_only_heads
from .wiring import add_input, place_before


if TYPE_CHECKING:
    from gradio.components import Component


def extend_chatbot(chatbot: ModuleType) -> None:
    """Put the switch into ``create_chat_box``, above upstream's own settings of an answer."""
    upstream = hooks.expect(chatbot, "create_chat_box", "engine")

    @functools.wraps(upstream)
    def create_chat_box(engine, *args, **kwargs) -> tuple["Component", "Component", dict[str, "Component"]]:
        import gradio as gr

        box, messages, elements = upstream(engine, *args, **kwargs)
        switch = gr.Dropdown(choices=list(STRATEGIES), value=STRATEGIES[0])
        try:
            add_input(engine.chatter.stream, switch)
            place_before(switch, elements["max_new_tokens"])
        except Exception as error:  # another gradio
            switch.visible = False
            hooks.fail(chatbot.__name__, error)
        return box, messages, elements | {"lmtp_decode": switch}

    chatbot.create_chat_box = create_chat_box


def extend_chatter(chatter: ModuleType) -> None:
    """Replace ``WebChatModel`` by a subclass that decodes as the switch says and tells how it went."""
    upstream = hooks.expect(chatter, "WebChatModel")
    hooks.expect(upstream, "load_model", "data")
    hooks.expect(upstream, "stream_chat", "messages", "input_kwargs")
    language_at = list(hooks.parameters(upstream.stream)).index("lang")
    known = len(hooks.parameters(upstream.stream)) - 1  # self

    class WebChatModel(upstream):
        __doc__ = upstream.__doc__
        _wish: Wish | None = None

        def load_model(self, data):
            import gradio as gr

            try:
                yield from super().load_model(self._with_base(data))
            except LMTPError as error:
                gr.Warning(str(error))
                yield str(error)

        def _with_base(self, data: dict) -> dict:
            """Where a warm-up's output was chosen as checkpoint: the model, and that output for its heads."""
            get = self.manager.get_elem_by_id
            name, method, run = (
                data[get(f"top.{key}")] for key in ("model_name", "finetuning_type", "checkpoint_path")
            )
            if not name or not run or isinstance(run, list):
                return data
            chosen = chatter.get_save_dir(name, method, run)
            if not holds_only_heads(chosen):
                return data
            extra_args = with_key(data[get("infer.extra_args")], "stage1_pretrained_path", str(chosen))
            return data | {get("top.checkpoint_path"): None, get("infer.extra_args"): extra_args}

        def stream(self, *values):
            values, strategy = values[:known], values[known:]
            if heads_of(getattr(self.engine, "model", None)) is None:
                yield from super().stream(*values)
                return
            view = copy.copy(self)  # several pages may ask at once
            view._wish = Wish(*strategy)
            conversation = None
            for conversation in super(WebChatModel, view).stream(*values):
                yield conversation
            if conversation is not None and view._wish.stats is not None:
                told = summary(view._wish, self.engine.tokenizer, values[language_at - 1])
                conversation[0][-1]["content"] += told
                yield conversation

        def stream_chat(self, *args, **kwargs):
            ours = {} if self._wish is None else {"lmtp_wish": self._wish}
            return super().stream_chat(*args, **kwargs, **ours)

    WebChatModel.__module__, WebChatModel.__qualname__ = upstream.__module__, upstream.__qualname__
    chatter.WebChatModel = WebChatModel
