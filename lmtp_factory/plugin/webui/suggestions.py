"""Suggested values that follow the stage until the user types others."""

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from ... import resources
from ..stages import STAGES
from .fields import stage_of
from .runs import finished_stage1_runs


if TYPE_CHECKING:
    from llamafactory.webui.manager import Manager


# The recipe in configs/ whose values are suggested for every model.
_RECIPE = "llama3.1-8b.yaml"


@functools.cache
def recipe(stage: int) -> dict[str, Any]:
    """Keys of the released recipe of a stage."""
    return yaml.safe_load((resources.folder("configs") / f"s{stage}" / _RECIPE).read_text(encoding="utf-8"))


def _suggested() -> dict[str, dict[int, str]]:
    """Component id to the value that each L-MTP stage suggests, as its text field shows it."""
    table: dict[str, dict[int, str]] = {}
    for stage in STAGES:
        keys = recipe(stage)
        learning_rate = np.format_float_scientific(keys["learning_rate"], trim="-", exp_digits=1)
        table.setdefault("top.finetuning_type", {})[stage] = keys["finetuning_type"]
        table.setdefault("train.learning_rate", {})[stage] = learning_rate
        table.setdefault("train.num_train_epochs", {})[stage] = str(keys["num_train_epochs"])
    return table


class Suggestions:
    """Values that the stage dropdown fills in.

    Attributes:
        ids: Ids of the components that `follow` updates.
    """

    def __init__(self, manager: "Manager"):
        suggested = _suggested()
        # Other stages suggest upstream's own value.
        self.table = {id: {None: manager.get_elem_by_id(id).value, **by_stage} for id, by_stage in suggested.items()}
        self.ids = (*suggested, "train.output_dir", "train.stage1_pretrained_path")

    def follow(
        self, label: str, typed: list[str], time: str, model_name: str | None, model_path: str | None, *values: Any
    ) -> list:
        """Updates of the components in `ids` after the user has chosen a stage.

        Args:
            label: Label of the stage.
            typed: Ids of components that the user has filled in.
            time: When the page was opened; upstream names outputs after it.
            model_name, model_path: The chosen model.
            values: Values of the components in `ids`.
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
            was_suggested = value in (None, "", *table[id].values())
            keep = proposal is None or id in typed or not was_suggested
            updates.append(gr.skip() if keep or proposal == value else gr.update(value=proposal))
        return updates
