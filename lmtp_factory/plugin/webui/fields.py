"""The L-MTP keys that the Train tab offers, and what of them goes into a command."""

from typing import TYPE_CHECKING, Any

from ..stages import STAGES


if TYPE_CHECKING:
    from llamafactory.webui.manager import Manager


# Stage to its keys; a component's id is "train." and the key.
_SHARED = ("num_heads", "leap_stride", "leap_offsets", "head_kind", "head_layers", "head_decay", "warmup_ratio")
FIELDS = {1: (*_SHARED, "hidden_cache_dir"), 2: (*_SHARED, "stage1_pretrained_path", "head_weight", "train_lm_head")}
ALL_FIELDS = tuple(dict.fromkeys(FIELDS[1] + FIELDS[2]))
# What a choice says that leaves its key out.
AUTO = "auto"


def stage_of(label: str | None) -> int | None:
    """1 or 2 for the label of an L-MTP stage in the Board's stage dropdown, else None."""
    from llamafactory.extras.constants import TRAINING_STAGES

    return next((stage for stage, name in STAGES.items() if TRAINING_STAGES.get(label) == name), None)


def written(values: dict[str, Any]) -> dict[str, Any]:
    """Without what was left empty."""
    return {key: value for key, value in values.items() if value not in (None, "", AUTO) and value is not False}


def train_arguments(manager: "Manager", data: dict, stage: int) -> dict[str, Any]:
    """The stage's keys that somebody filled in.

    Args:
        manager: the Board's, which knows components by their ids.
        data: component to value, as upstream's handlers get it.
    """
    fields = {name: component for name, component in manager.get_elem_iter() if name in FIELDS[stage]}
    values = written({name: data.get(component) for name, component in fields.items()})
    if data[manager.get_elem_by_id("train.warmup_steps")]:  # the Trainer would let the ratio win
        values.pop("warmup_ratio", None)
    return values
