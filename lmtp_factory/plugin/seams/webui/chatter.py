"""Finds heads of warm-ups in the Chat tab, decodes as its switch says, and shows statistics below each answer."""

import copy
from types import ModuleType

from ....errors import LMTPError
from ....modeling import heads_of
from ... import hooks
from ...chat import ChatRequest
from ...webui.answer import summary
from ...webui.fields import with_key
from ...webui.runs import holds_only_heads


def extend(chatter: ModuleType) -> None:
    """Replace `WebChatModel` by a subclass."""
    upstream = hooks.expect(chatter, "WebChatModel")
    hooks.expect(upstream, "load_model", "data")
    hooks.expect(upstream, "stream_chat", "messages", "input_kwargs")
    language_at = list(hooks.parameters(upstream.stream)).index("lang")
    known = len(hooks.parameters(upstream.stream)) - 1  # without self

    class WebChatModel(upstream):
        __doc__ = upstream.__doc__
        _request: ChatRequest | None = None

        def load_model(self, data):
            import gradio as gr

            try:
                yield from super().load_model(self._with_base(data))
            except LMTPError as error:
                gr.Warning(str(error))
                yield str(error)

        def _with_base(self, data: dict) -> dict:
            """Replace a warm-up's output, chosen as checkpoint, by its base model and `stage1_pretrained_path`."""
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
            view._request = ChatRequest(*strategy)
            conversation = None
            for conversation in super(WebChatModel, view).stream(*values):
                yield conversation
            if conversation is not None and view._request.stats is not None:
                html = summary(view._request, self.engine.tokenizer, values[language_at - 1])
                conversation[0][-1]["content"] += html
                yield conversation

        def stream_chat(self, *args, **kwargs):
            if self._request is not None:
                kwargs["lmtp_request"] = self._request
            return super().stream_chat(*args, **kwargs)

    WebChatModel.__module__, WebChatModel.__qualname__ = upstream.__module__, upstream.__qualname__
    chatter.WebChatModel = WebChatModel
