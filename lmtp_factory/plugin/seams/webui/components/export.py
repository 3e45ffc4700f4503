"""Adds the choice of `lmtp_export` to the Export tab, and shows why an export with heads is refused."""

import functools
from types import ModuleType

from .....errors import LMTPError
from .....files import HEADS_FOLDER
from .....modeling.checkpoint import read_config
from .....options import EXPORTS
from .... import hooks
from ....webui.fields import with_key
from ....webui.runs import holds_only_heads
from ....webui.wiring import add_input, place_before


def extend(export: ModuleType) -> None:
    """Wrap `create_export_tab`, its handler `save_model`, and the `export_model` that the handler calls."""
    create_export_tab = hooks.expect(export, "create_export_tab", "engine")
    save_model = hooks.expect(export, "save_model", "extra_args")
    export_model = hooks.expect(export, "export_model", "args")
    extra_args_at = list(hooks.parameters(save_model)).index("extra_args")

    @functools.wraps(save_model)
    def save_model_with_heads(*values):
        import gradio as gr

        values, choice = list(values[: extra_args_at + 1]), values[extra_args_at + 1 :]
        values[extra_args_at] = with_key(values[extra_args_at], "lmtp_export", *choice)
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
        except Exception as error:  # the layout of another gradio version
            row.visible = False
            hooks.fail(export.__name__, error)
        return elements | {"lmtp_export": choice}

    export.save_model, export.export_model = save_model_with_heads, export_model_of_base
    export.create_export_tab = create_export_tab_with_heads
