"""Values that follow the stage, as long as nobody typed others."""

from typing import TYPE_CHECKING, Any

from ..stages import STAGES
from .fields import stage_of
from .runs import finished_stage1_runs


if TYPE_CHECKING:
    from llamafactory.webui.manager import Manager


# Component id to each stage's value, from the recipe in configs/; other stages take upstream's own.
SUGGESTED = {
    "top.finetuning_type": {1: "full", 2: "lora"},
    "train.learning_rate": {1: "1e-3", 2: "1e-5"},
    "train.num_train_epochs": {1: "1.0", 2: "3.0"},
}


class Suggestions:
    """What the stage dropdown fills in.

    Attributes:
        ids: of the components that :meth:`follow` may change.
    """

    def __init__(self, manager: "Manager"):
        self.table = {id: {None: manager.get_elem_by_id(id).value, **by_stage} for id, by_stage in SUGGESTED.items()}
        self.ids = (*SUGGESTED, "train.output_dir", "train.stage1_pretrained_path")

    def follow(
        self, label: str, typed: list[str], time: str, model_name: str | None, model_path: str | None, *values: Any
    ) -> list:
        """Updates of the components in ``ids`` after somebody chose a stage.

        Args:
            label: of the stage.
            typed: ids of components that somebody filled in by hand.
            time: when the page was opened; upstream names outputs after it.
            values: of the components now.
        """
        import gradio as gr

        stage = stage_of(label)
        table = self.table | {
            "train.output_dir": {s: f"{STAGES.get(s, 'train')}_{time}" for s in (None, *STAGES)},
            "train.stage1_pretrained_path": {2: next(iter(finished_stage1_runs(model_name, model_path)), None)},
        }
        updates = []
        for id, value in zip(self.ids, values):
            proposal = table[id].get(stage)
            mine = value in (None, "", *table[id].values())
            keep = proposal is None or id in typed or not mine
            updates.append(gr.skip() if keep or proposal == value else gr.update(value=proposal))
        return updates
