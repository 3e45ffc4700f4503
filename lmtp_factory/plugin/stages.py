"""The two stages' names, and heads-only directories as checkpoints (``llamafactory.extras.constants``)."""

from types import ModuleType

from ..files import HEADS_FOLDER, WEIGHTS_FILE


STAGES = {1: "lmtp1", 2: "lmtp2"}
STAGE_LABELS = {"L-MTP: Head Warm-up": STAGES[1], "L-MTP: Full Tuning": STAGES[2]}
# Upstream joins these names to a directory, so a path below it works.
HEADS_CHECKPOINT = f"{HEADS_FOLDER}/{WEIGHTS_FILE}"


def extend_constants(constants: ModuleType) -> None:
    """Append, in place and at the end: the web UI binds the tables by reference, and its default is the first entry."""
    constants.TRAINING_STAGES.update(STAGE_LABELS)
    constants.CHECKPOINT_NAMES.add(HEADS_CHECKPOINT)
