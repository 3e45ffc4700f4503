"""Export with or without the heads (``llamafactory.webui.components.export``)."""

import functools
import json
from types import ModuleType

from ...errors import LMTPError
from ...files import HEADS_FOLDER
from ...modeling.checkpoint import read_config
from .. import hooks
from ..arguments import EXPORTS
from .runs import holds_only_heads
from .wiring import add_input, place_before


def extend_export(export: ModuleType) -> None:
    """Let the tab ask what to do with the heads, and say what is wrong where they cannot be exported."""
    create_export_tab = hooks.expect(export, "create_export_tab", "engine")
    save_model = hooks.expect(export, "save_model", "extra_args")
    export_model = hooks.expect(export, "export_model", "args")
    extra_args_at = list(hooks.parameters(save_model)).index("extra_args")

    @functools.wraps(save_model)
    def save_model_with_heads(*values):
        import gradio as gr

        values, asked = list(values[: extra_args_at + 1]), values[extra_args_at + 1 :]
        values[extra_args_at] = with_key(values[extra_args_at], "lmtp_export", *asked)
        try:
            yield from save_model(*values)
        except LMTPError as error:
            gr.Warning(str(error))
            yield str(error)

    def export_model_of_base(args):
        args = dict(args)
        chosen = args.get("model_name_or_path")
        if chosen and holds_only_heads(chosen):  # a warm-up's output, which upstream offers as a checkpoint
            base = read_config(f"{chosen}/{HEADS_FOLDER}").base_model
            args |= {"model_name_or_path": base or chosen, "stage1_pretrained_path": chosen}
        export_model(args)

    @functools.wraps(create_export_tab)
    def create_export_tab_with_heads(engine):
        import gradio as gr

        elements = create_export_tab(engine)
        with gr.Row() as row:
            choice = gr.Radio(choices=list(EXPORTS), value=EXPORTS[0])
        try:
            add_input(save_model_with_heads, choice)
            place_before(row, elements["export_btn"])
        except Exception as error:  # another gradio
            row.visible = False
            hooks.fail(export.__name__, error)
        return elements | {"lmtp_export": choice}

    export.save_model, export.export_model = save_model_with_heads, export_model_of_base
    export.create_export_tab = create_export_tab_with_heads


def with_key(extra_args: str, key: str, value: str | None = None) -> str:
    """The JSON text with a key more, unless it is written there or the text is no JSON, as upstream will say."""
    try:
        written = json.loads(extra_args)
    except json.JSONDecodeError:
        return extra_args
    return json.dumps(({} if value is None else {key: value}) | written)
