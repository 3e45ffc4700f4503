"""The L-MTP panel of the Train tab (``llamafactory.webui.components.train``), shown for the two stages only."""

import functools
import os
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ...config import HEAD_KINDS, LMTPConfig
from ...errors import LMTPError
from ...files import HEADS_FOLDER
from ...modeling.checkpoint import read_config
from .. import hooks
from ..arguments import LMTPArguments
from .fields import AUTO, stage_of, written
from .runs import finished_stage1_runs
from .suggestions import Suggestions
from .wiring import place_before


if TYPE_CHECKING:
    from gradio.components import Component
    from llamafactory.webui.engine import Engine


def extend_train(train: ModuleType) -> None:
    """Let ``create_train_tab`` build our panel and make its fields inputs of upstream's buttons."""
    from llamafactory.webui.manager import Manager

    upstream = hooks.expect(train, "create_train_tab", "engine")
    change_stage = hooks.expect(train, "change_stage", "training_stage")
    hooks.expect(Manager, "get_base_elems")

    @functools.wraps(upstream)
    def create_train_tab(engine):
        try:
            panel = Panel()
        except Exception as error:  # another gradio
            hooks.fail(train.__name__, error)
            return upstream(engine)
        base = engine.manager.get_base_elems
        engine.manager.get_base_elems = lambda: base() | panel.inputs  # where upstream starts its list of inputs
        try:
            elements = upstream(engine)
        finally:
            del engine.manager.get_base_elems
        elements |= panel.elements
        engine.manager.add_elems("train", elements)  # upstream does it again with what we return
        try:
            place_before(panel.accordion, elements["extra_tab"])
            panel.connect(engine)
        except Exception as error:  # nothing shows the panel then
            hooks.fail(train.__name__, error)
        return elements

    @functools.wraps(change_stage)
    def change_stage_keeping_data(training_stage):
        # Upstream empties the dataset, also when saved arguments are loaded; ours read what plain SFT reads.
        if stage_of(training_stage) is None:
            return change_stage(training_stage)
        import gradio as gr

        return gr.skip(), gr.skip()

    train.create_train_tab = create_train_tab
    train.change_stage = change_stage_keeping_data


class Panel:
    """The panel's components.

    Attributes:
        elements: name to component, as upstream's manager registers them under ``train.``.
        inputs: those whose values go into commands and saved arguments.
    """

    def __init__(self):
        import gradio as gr

        fresh, defaults = LMTPConfig(), LMTPArguments.__dataclass_fields__
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
                head_decay = gr.Number(value=None, placeholder=str(defaults["head_decay"].default))
                warmup_ratio = gr.Slider(minimum=0, maximum=0.5, value=0.1, step=0.01)
            with gr.Row(visible=False) as row1:
                hidden_cache_dir = gr.Textbox()
            with gr.Row(visible=False) as row2:
                stage1_pretrained_path = gr.Dropdown(choices=[""], value="", allow_custom_value=True, scale=3)
                head_weight = gr.Number(value=None, placeholder=str(defaults["head_weight"].default))
                train_lm_head = gr.Checkbox()
        self.rows = {1: row1, 2: row2}
        self.fields: dict[str, Component] = dict(
            num_heads=num_heads, leap_stride=leap_stride, leap_offsets=leap_offsets, head_kind=head_kind,
            head_layers=head_layers, head_decay=head_decay, warmup_ratio=warmup_ratio, hidden_cache_dir=hidden_cache_dir,
            stage1_pretrained_path=stage1_pretrained_path, head_weight=head_weight, train_lm_head=train_lm_head,
        )  # fmt: skip
        self.inputs = set(self.fields.values())
        self.elements = {"lmtp_panel": self.accordion, "lmtp_about": about, "lmtp_reach": reach, **self.fields}

    def connect(self, engine: "Engine") -> None:
        """What happens when somebody chooses or types."""
        import gradio as gr

        manager = engine.manager
        stage, model_name, model_path, time = map(
            manager.get_elem_by_id, ("train.training_stage", "top.model_name", "top.model_path", "train.current_time")
        )
        stage.change(self.show, [stage], [self.accordion, *self.rows.values()], queue=False)

        # `input` is a person's doing, `change` also that of loaded arguments: those must stay as they were saved.
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
        """Visibility of the panel and of each stage's own row."""
        import gradio as gr

        stage = stage_of(label)
        return [gr.Accordion(visible=stage is not None), gr.Row(visible=stage == 1), gr.Row(visible=stage == 2)]


def list_runs(model_name: str | None, model_path: str | None) -> dict:
    """The picker with the model's finished warm-ups; an empty choice stands for fresh heads."""
    import gradio as gr

    return gr.update(choices=["", *finished_stage1_runs(model_name, model_path)])


def check_geometry(*values) -> tuple[str, dict]:
    """How far ahead the heads look, and the line that says why there can be no such heads."""
    import gradio as gr

    try:
        return tokens_predicted(*values), gr.update(visible=False)
    except LMTPError as error:
        return "", gr.update(value=f"⚠ {error}", visible=True)


def tokens_predicted(label: str, num_heads: Any, leap_stride: Any, leap_offsets: str, heads_from: str | None) -> str:
    """How far ahead the heads look that these fields describe; empty where only the hub knows.

    Raises:
        LMTPError: impossible offsets, or others than the heads in ``heads_from`` have.
    """
    from llamafactory.hparams import FinetuningArguments

    keys = written({"num_heads": num_heads, "leap_stride": leap_stride, "leap_offsets": leap_offsets})
    arguments = FinetuningArguments(**keys)
    config = arguments.heads_config()
    if stage_of(label) == 2 and heads_from:
        if not os.path.isdir(heads_from):
            return ""
        config = read_config(f"{heads_from}/{HEADS_FOLDER}")
        if difference := arguments.contradicts(config):
            raise LMTPError(f"The heads in {heads_from} do not fit: {difference}.")
    return _in_words(config)


def _in_words(config: LMTPConfig) -> str:
    return ", ".join(f"+{offset}" for offset in config.offsets)


def _with(id: str, typed: list[str]) -> list[str]:
    return typed if id in typed else [*typed, id]
