"""Adds the stages' names, and heads-only directories as checkpoints."""

from types import ModuleType

from ....files import HEADS_CHECKPOINT
from ...stages import STAGE_LABELS


def extend(constants: ModuleType) -> None:
    """Append to upstream's tables in place: the web UI binds them by reference, and its default is the first entry.

    Upstream joins the names of checkpoint files to a directory, so a path below it works too.
    """
    constants.TRAINING_STAGES.update(STAGE_LABELS)
    constants.CHECKPOINT_NAMES.add(HEADS_CHECKPOINT)
