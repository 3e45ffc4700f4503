"""L-MTP keys in the Board's fields, and how they become part of a command."""

import json
from typing import TYPE_CHECKING, Any

from ..stages import STAGES


if TYPE_CHECKING:
    from llamafactory.webui.manager import Manager


# Keys of each stage. The id of a component is "train." and its key.
_SHARED = (
    "num_heads", "leap_stride", "leap_offsets", "head_kind", "head_layers", "head_block", "head_inputs", "head_backs",
    "draft_vocab_size", "head_decay", "warmup_ratio",
)  # fmt: skip
FIELDS = {
    1: (*_SHARED, "hidden_cache_dir"),
    2: (*_SHARED, "stage1_pretrained_path", "head_weight", "head_learning_rate", "train_lm_head"),
}
ALL_FIELDS = tuple(dict.fromkeys(FIELDS[1] + FIELDS[2]))
# The choice that leaves a key out.
AUTO = "auto"


def stage_of(label: str | None) -> int | None:
    """1 or 2 for the label of an L-MTP stage in the Board's dropdown; None for another stage."""
    from llamafactory.extras.constants import TRAINING_STAGES

    return next((stage for stage, name in STAGES.items() if TRAINING_STAGES.get(label) == name), None)


def written(values: dict[str, Any]) -> dict[str, Any]:
    """Values of the fields that are filled in."""
    return {key: value for key, value in values.items() if value not in (None, "", AUTO) and value is not False}


def train_arguments(manager: "Manager", data: dict, stage: int) -> dict[str, Any]:
    """Keys of a stage that are filled in, with their values.

    Args:
        manager: The Board's register of components by id.
        data: Component to value, as upstream's handlers get it.
        stage: 1 or 2.
    """
    fields = {name: component for name, component in manager.get_elem_iter() if name in FIELDS[stage]}
    values = written({name: data.get(component) for name, component in fields.items()})
    if data[manager.get_elem_by_id("train.warmup_steps")]:  # the Trainer would use the ratio
        values.pop("warmup_ratio", None)
    return values


def with_key(extra_args: str, key: str, value: str | None = None) -> str:
    """Add a key to JSON text, unless the text holds the key already or is no JSON (upstream then says so)."""
    try:
        written = json.loads(extra_args)
    except json.JSONDecodeError:
        return extra_args
    return json.dumps(({} if value is None else {key: value}) | written)
