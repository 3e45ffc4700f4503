"""The L-MTP panel of the Train tab, visible for the two stages only."""

import functools
import os
from typing import TYPE_CHECKING, Any

from ...config import LMTPConfig
from ...errors import LMTPError
from ...files import HEADS_FOLDER
from ...modeling.checkpoint import read_config
from ...options import HEAD_BLOCKS, HEAD_DECAY, HEAD_INPUTS, HEAD_KINDS, HEAD_WEIGHT
from .fields import AUTO, stage_of, written
from .runs import finished_stage1_runs
from .suggestions import Suggestions, recipe


if TYPE_CHECKING:
    from gradio.components import Component
    from llamafactory.webui.engine import Engine


class Panel:
    """Components of the panel.

    Attributes:
        elements: Name to component, as upstream's manager registers them under `train.`.
        inputs: Components whose values become part of commands and saved arguments.
    """

    def __init__(self):
        import gradio as gr

        fresh = LMTPConfig()
        with gr.Accordion(open=True, visible=False) as self.accordion:
            about = gr.Markdown()
            with gr.Row():
                num_heads = gr.Number(value=None, minimum=1, precision=0, placeholder=str(fresh.num_heads))
                leap_stride = gr.Number(value=None, minimum=1, precision=0, placeholder=str(fresh.stride))
                leap_offsets = gr.Textbox()
                reach = gr.Textbox(value=_in_words(fresh), interactive=False)
            self.problem = gr.Markdown(visible=False)
            with gr.Row():
                head_kind = gr.Dropdown(choices=[AUTO, *HEAD_KINDS], value=AUTO)
                head_layers = gr.Number(value=None, minimum=1, precision=0, placeholder=str(fresh.head_layers))
                head_block = gr.Dropdown(choices=[AUTO, *HEAD_BLOCKS], value=AUTO)
                # Without a placeholder the page sends 0 for an empty number.
                draft_vocab_size = gr.Number(value=None, minimum=1, precision=0, placeholder=AUTO)
            with gr.Row():
                head_inputs = gr.Dropdown(choices=[AUTO, *HEAD_INPUTS], value=AUTO)
                head_backs = gr.Number(value=None, minimum=1, precision=0, placeholder=str(fresh.head_backs))
                head_decay = gr.Number(value=None, placeholder=str(HEAD_DECAY))
                warmup_ratio = gr.Slider(minimum=0, maximum=0.5, value=recipe(1)["warmup_ratio"], step=0.01)
            with gr.Row(visible=False) as row1:
                hidden_cache_dir = gr.Textbox()
            with gr.Row(visible=False) as row2:
                stage1_pretrained_path = gr.Dropdown(choices=[""], value="", allow_custom_value=True, scale=3)
                head_weight = gr.Number(value=None, placeholder=str(HEAD_WEIGHT))
                head_learning_rate = gr.Number(value=None, placeholder=AUTO)
                train_lm_head = gr.Checkbox()
        self.rows = {1: row1, 2: row2}
        self.fields: dict[str, Component] = dict(
            num_heads=num_heads, leap_stride=leap_stride, leap_offsets=leap_offsets, head_kind=head_kind,
            head_layers=head_layers, head_block=head_block, head_inputs=head_inputs, head_backs=head_backs,
            draft_vocab_size=draft_vocab_size, head_decay=head_decay, warmup_ratio=warmup_ratio,
            hidden_cache_dir=hidden_cache_dir,
            stage1_pretrained_path=stage1_pretrained_path, head_weight=head_weight,
            head_learning_rate=head_learning_rate, train_lm_head=train_lm_head,
        )  # fmt: skip
        self.inputs = set(self.fields.values())
        self.elements = {"lmtp_panel": self.accordion, "lmtp_about": about, "lmtp_reach": reach, **self.fields}

    def connect(self, engine: "Engine") -> None:
        """Register the handlers of the panel's components."""
        import gradio as gr

        manager = engine.manager
        stage, model_name, model_path, time = map(
            manager.get_elem_by_id, ("train.training_stage", "top.model_name", "top.model_path", "train.current_time")
        )
        stage.change(self.show, [stage], [self.accordion, *self.rows.values()], queue=False)

        # A user causes `input`. Loaded arguments cause `change` too, and have to stay as they were saved.
        suggestions, typed = Suggestions(manager), gr.State([])
        followers = [manager.get_elem_by_id(id) for id in suggestions.ids]
        stage.input(
            suggestions.follow, [stage, typed, time, model_name, model_path, *followers], followers, queue=False
        )
        for id, component in zip(suggestions.ids, followers):
            component.input(functools.partial(_with, id), [typed], [typed], queue=False)

        picker = self.fields["stage1_pretrained_path"]
        picker.focus(list_runs, [model_name, model_path], [picker], queue=False)
        model_name.input(lambda: "", outputs=[picker], queue=False)

        geometry = [self.fields[key] for key in ("num_heads", "leap_stride", "leap_offsets", "stage1_pretrained_path")]
        for component in (stage, *geometry):
            component.change(
                check_geometry, [stage, *geometry], [self.elements["lmtp_reach"], self.problem], queue=False
            )

    @staticmethod
    def show(label: str) -> list:
        """Updates that show the panel and the chosen stage's row."""
        import gradio as gr

        stage = stage_of(label)
        return [gr.Accordion(visible=stage is not None), gr.Row(visible=stage == 1), gr.Row(visible=stage == 2)]


def list_runs(model_name: str | None, model_path: str | None) -> dict:
    """Choices of the picker: the model's finished warm-ups, and an empty one for fresh heads."""
    import gradio as gr

    return gr.update(choices=["", *finished_stage1_runs(model_name, model_path)])


def check_geometry(*values) -> tuple[str, dict]:
    """Text of the field that shows the heads' offsets, and an update of the line that says why there are no such heads."""
    import gradio as gr

    try:
        return tokens_predicted(*values), gr.update(visible=False)
    except LMTPError as error:
        return "", gr.update(value=f"⚠ {error}", visible=True)


def tokens_predicted(label: str, num_heads: Any, leap_stride: Any, leap_offsets: str, heads_from: str | None) -> str:
    """Offsets of the heads that the fields describe; empty if only the hub knows them.

    Raises:
        LMTPError: The offsets are impossible, or the heads in `heads_from` have others.
    """
    from llamafactory.hparams import FinetuningArguments

    keys = written({"num_heads": num_heads, "leap_stride": leap_stride, "leap_offsets": leap_offsets})
    arguments = FinetuningArguments(**keys)
    config = arguments.heads_config()
    if stage_of(label) == 2 and heads_from:
        if not os.path.isdir(heads_from):
            return ""
        config = read_config(f"{heads_from}/{HEADS_FOLDER}")
        if difference := arguments.first_difference(config):
            raise LMTPError(f"The heads in {heads_from} do not fit: {difference}.")
    return _in_words(config)


def _in_words(config: LMTPConfig) -> str:
    return ", ".join(f"+{offset}" for offset in config.offsets)


def _with(id: str, typed: list[str]) -> list[str]:
    return typed if id in typed else [*typed, id]
